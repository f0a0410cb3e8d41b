"""Compare tiled inference with a single pass, as in the paper's table of halos, and measure peak memory.

    python tests/benchmarks/inference_tiling.py --saved_model_filepath results/cells/saved_model --image field.tif

The paper is Majurski and Bajcsy, J. Res. NIST 126:126009. For each halo, the image is segmented in tiles and compared
with the softmax of a single pass over the complete image, which must fit into memory. With the network's radius as the
halo, no pixel may differ. The errors at smaller halos show that the comparison detects them. Each turn times a single
pass and then the tiles, including reading and argmax; ratios are computed within a turn. The last line of the table
uses the tiles that inference_unet.py chooses. Then inference_unet.py runs on synthetic tiled BigTIFFs of growing size,
alternately without and with overviews. If no model or image is given, a random one is made.
"""

import contextlib
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, finish, machine, make_parser, summarize

import inference_unet
from cli import positive_int
from image_files import ChannelStatistics, ImageFile
from lmdb_utils import RADIUS, SIZE_FACTOR

HALOS = range(0, 97, 16)
FILE_TILE = 512  # pixels; edge of the tiles in synthetic files


def save_random_model(folder, features):
    """Save a network with random weights and normalization; return its folder."""
    import tensorflow as tf

    from unet_model import BatchNormalization, build_unet, export_saved_model

    tf.keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    model = build_unet(1, 2, features)
    for layer in model.layers:
        if isinstance(layer, BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weights.shape) for weights in layer.get_weights()])
    metadata = {"radius": RADIUS, "size_factor": SIZE_FACTOR, "baseline_feature_depth": features}
    export_saved_model(model, folder / "saved_model", metadata)
    return folder / "saved_model"


def write_synthetic(path, edge, channels):
    """Write a square uint8 BigTIFF of smooth random texture with noise, tile by tile."""
    import tifffile
    from scipy import ndimage

    rng = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(rng.standard_normal((FILE_TILE, FILE_TILE, channels)), (8, 8, 0), mode="wrap")
    texture = 128 + 40 * texture / texture.std() + rng.normal(0, 8, texture.shape)
    texture = np.squeeze(texture.clip(0, 255).astype(np.uint8))
    tiles = (np.roll(texture, (37 * i, 101 * i), (0, 1)) for i in range((-(-edge // FILE_TILE)) ** 2))
    tifffile.imwrite(
        path,
        tiles,
        shape=(edge, edge, channels)[: texture.ndim],
        dtype=np.uint8,
        tile=(FILE_TILE, FILE_TILE),
        compression="zlib",
        photometric="minisblack",
        planarconfig="contig" if channels > 1 else None,
        bigtiff=True,
    )
    return path


def timed_softmax(path, model, sizer):
    """Segment a file; return the seconds, the softmax (H, W, classes) and the tile shape."""
    start = time.perf_counter()
    with ImageFile(path, channels=model.channels) as image:
        statistics_of_channels = ChannelStatistics.of_file(image)
        height, width, _ = image.shape
        tile = sizer.shape(*(inference_unet.round_up(length, model.size_factor) for length in (height, width)))
        tiles = inference_unet.plan_tiles(image.shape, tile, model)
        softmax = np.empty((height, width, model.number_classes), np.float32)
        blocks = inference_unet.segment(image, statistics_of_channels, tiles, sizer.batch_size(tile), model)
        for block in blocks:
            rows, columns = block.classes.shape
            softmax[block.row : block.row + rows, block.column : block.column + columns] = block.softmax
    return time.perf_counter() - start, softmax, tile


def compare(path, model, tile_size, runs):
    """Return one line of the table for each halo at a fixed tile size, and one for the automatic tiles."""
    single_pass = inference_unet.TileSizer(model, 2**62)
    timed_softmax(path, model, single_pass)  # the first pass of a process is slower
    lines = []
    for halo in [*HALOS, None]:
        if halo is None:
            candidate, longest = model, None
        else:
            candidate, longest = dataclasses.replace(model, radius=halo), tile_size
        sizer = inference_unet.TileSizer(candidate, inference_unet.affordable_pixels(model), longest)
        turns = []
        for _ in range(runs):
            whole_seconds, whole, _ = timed_softmax(path, model, single_pass)
            seconds, softmax, tile = timed_softmax(path, candidate, sizer)
            turns.append((seconds, whole_seconds))
        difference = softmax.astype(np.float64) - whole
        lines.append(
            {
                "tile": "automatic" if halo is None else "fixed",
                "halo": candidate.halo,
                "tile_rows": tile[0],
                "tile_columns": tile[1],
                "rmse": float(np.sqrt(np.mean(difference**2))),
                "misclassified_pixels": int((softmax.argmax(-1) != whole.argmax(-1)).sum()),
                "seconds": statistics.median(seconds for seconds, _ in turns),
                "single_pass_seconds": statistics.median(seconds for _, seconds in turns),
                "relative_runtime": summarize([seconds / whole_seconds for seconds, whole_seconds in turns]),
            }
        )
    return lines


def measure_script(model_folder, edge, channels, runs):
    """Return the peak memory and time of the script on a synthetic image, and the relative time with overviews."""
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder) / "a.tif", edge, channels)
        turns = [[run_script(model_folder, folder, overviews) for overviews in (0, 1)] for _ in range(runs)]
    of_the_image = statistics.median(turn[1]["image_seconds"] for turn in turns)
    return {
        "edge": edge,
        "peak_mebibytes": max(turn[1]["peak_mebibytes"] for turn in turns),
        "seconds": statistics.median(turn[1]["seconds"] for turn in turns),
        "image_seconds": of_the_image,
        "nanoseconds_per_pixel": 1e9 * of_the_image / edge**2,
        "overviews": summarize([turn[1]["image_seconds"] / turn[0]["image_seconds"] for turn in turns]),
    }


def run_script(model_folder, folder, overviews):
    """Return the peak memory and time of the script on the image in a folder."""
    with open(Path(folder) / "log", "w+") as log:
        command = [sys.executable, ROOT / "inference_unet.py", "--saved_model_filepath", model_folder]
        command += ["--image_folder", folder, "--output_folder", f"{folder}/masks", "--overwrite", 1]
        command += ["--overviews", overviews]
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        log.seek(0)
        printed = log.read()
    if status:
        sys.exit(printed)
    of_the_image = float(re.search(r"1/1 a\.tif: .*, ([\d.]+) s, ", printed)[1])  # excludes the start of TensorFlow
    of_the_image = max(of_the_image, 0.05)  # the log is rounded to tenths
    return {"peak_mebibytes": usage.ru_maxrss / 1024, "seconds": seconds, "image_seconds": of_the_image}


def report(results):
    """Print the tables."""
    print(machine())
    print("tile            halo        RMSE  misclassified  seconds  single pass  relative runtime")
    for line in results["lines"]:
        size = f"{line['tile_rows']} x {line['tile_columns']}"
        median, least, greatest = line["relative_runtime"].values()
        print(
            f"{size:13} {line['halo']:6} {line['rmse']:11.2e} {line['misclassified_pixels']:14} {line['seconds']:8.2f} "
            f"{line['single_pass_seconds']:12.2f}  {median:.2f} ({least:.2f} to {greatest:.2f})"
            f"{'  chosen by the program' if line['tile'] == 'automatic' else ''}"
        )
    print("image                 peak memory  seconds  of these the image  ns per pixel  with overviews")
    for line in results["memory"]:
        median, least, greatest = line["overviews"].values()
        print(
            f"{line['edge']:6} x {line['edge']:6} {line['peak_mebibytes']:14.0f} MiB {line['seconds']:8.1f} "
            f"{line['image_seconds']:19.1f} {line['nanoseconds_per_pixel']:13.1f}  "
            f"{median:.2f} ({least:.2f} to {greatest:.2f})"
        )


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--saved_model_filepath", help="model to use (None = a random one)")
    parser.add_argument("--baseline_feature_depth", type=positive_int, default=4, help="features of the random model")
    parser.add_argument("--image", help="image to segment (None = a random one)")
    parser.add_argument("--edge", type=positive_int, default=3584, help="edge of the random image in pixels")
    parser.add_argument("--tile_size", type=positive_int, default=512, help="edge of the tiles in the table of halos")
    parser.add_argument("--runs", type=positive_int, default=3, help="number of measurements; the median counts")
    parser.add_argument(
        "--memory_edges", type=int, nargs="*", default=[4000, 16000], help="image edges in pixels for peak memory"
    )
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model_folder = args.saved_model_filepath or save_random_model(folder, args.baseline_feature_depth)
        model = inference_unet.load_model(model_folder)
        image = args.image or write_synthetic(folder / "random.tif", args.edge, model.channels)
        results = {
            "lines": compare(image, model, args.tile_size, args.runs),
            "memory": [measure_script(model_folder, edge, model.channels, args.runs) for edge in args.memory_edges],
        }
    if not args.json:
        report(results)
    finish(results, args.json)


if __name__ == "__main__":
    main()
