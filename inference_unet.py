r"""Segment every image of a folder with a trained model.

    python inference_unet.py --saved_model_filepath results/cells/saved_model --image_folder images/ \
        --output_folder masks/

Owns tiling and the folder loop. The tiled result equals that of the whole image in one pass (Majurski and Bajcsy,
J. Res. NIST 126:126009): each tile carries a halo of the network's radius, of which nothing is kept. TensorFlow is
imported inside functions, so that ``-h`` answers at once.
"""

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar

import numpy as np

from lmdb_utils import (
    EXIT_BAD_INPUT,
    InputError,
    Progress,
    add_flag,
    configure_logging,
    count_classes,
    existing_folder,
    log_settings,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from imagereader import ChannelStatistics, ImageFile

Item = TypeVar("Item")

MASK_TILE = 256  # pixels; edge of the tiles that a mask file is made of
BIGTIFF_FROM_BYTES = 2**32 - 2**25  # a classic TIFF counts its bytes with 32 bits
MAX_TILE_SIZE = 2048  # pixels; with larger ones halos of 96 save less than 10 % more of the work
MEMORY_SHARE = 0.5  # of what is free, for the network's activations
# Of the network while it works, measured for 2 to 64 features at the top level: six float32 values of each feature.
BYTES_PER_PIXEL_AND_FEATURE = 24
PAPER_FEATURES = 64  # of a model that does not tell its own


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="inference",
        description="Script to segment the images of a folder with the selected unet model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_options(parser)
    add_run_options(parser)
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what the specification lists: the model, the images, and where masks go."""
    required: dict[str, Any] = {"required": True, "default": argparse.SUPPRESS}
    text = "SavedModel filepath to the model to use (Required)"
    parser.add_argument("--saved_model_filepath", **required, help=text)
    text = "filepath to the folder containing the images to inference (Required)"
    parser.add_argument("--image_folder", type=existing_folder, **required, help=text)
    text = "filepath to the folder where the masks will be placed (Required)"
    parser.add_argument("--output_folder", type=Path, **required, help=text)
    parser.add_argument(
        "--image_format",
        metavar="IMAGE_FORMAT",
        choices=("tif", "png", "jpg"),
        default="tif",
        help="format (extension) of the input images. E.g {tif, jpg, png)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add options beyond the specification."""
    parser.add_argument(
        "--tile_size",
        type=positive_int,
        help="largest edge in pixels of the tiles that larger images are cut into, overlap included; the result does "
        f"not depend on it, memory and speed do (None = as fits into half of the free memory, up to {MAX_TILE_SIZE})",
    )
    text = "whether to replace masks that exist already [0 = false, 1 = true]; otherwise their images are skipped"
    add_flag(parser, "--overwrite", 0, text)
    parser.add_argument(
        "--shard",
        metavar="PART/PARTS",
        type=Shard.parse,
        help="do one of several parts of the images, such as 2/8, and leave the others to other processes; under Slurm "
        "the tasks of an srun and the elements of a job array share the images by themselves",
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    configure_logging()
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Segment all images; a bad one is reported and the others go on."""
    from imagereader import list_images

    log_settings(args)
    images = list_images(args.image_folder, args.image_format)
    shard = args.shard or shard_from_slurm(os.environ)
    images = images[shard.part - 1 :: shard.parts]
    if shard.parts > 1:
        logging.info("part %d of %d: %d images", shard.part, shard.parts, len(images))
    prepare_output_folder(args.output_folder, args.image_folder)
    model = load_model(args.saved_model_filepath)
    sizer = TileSizer(model, args.tile_size or affordable_tile_size(model))
    targets = {path: args.output_folder / mask_name(path) for path in images}
    waiting = [path for path in images if args.overwrite or not targets[path].exists()]
    if len(waiting) < len(images):
        logging.info("%d masks exist already and are kept; --overwrite 1 replaces them", len(images) - len(waiting))
    failed = []
    for number, path in enumerate(waiting, 1):
        start = time.monotonic()
        try:
            shape, counts = segment_file(path, targets[path], model, sizer)
        except InputError as error:
            failed.append(path.name)
            logging.error("%s", error)
            continue
        size, seconds = " x ".join(map(str, shape)), time.monotonic() - start
        logging.info(
            "%d/%d %s: %s, %.1f s, %s",
            number, len(waiting), targets[path].name, size, seconds, describe_histogram(counts),
        )  # fmt: skip
    logging.info(
        "%d of %d images done; the masks are in %s", len(images) - len(failed), len(images), args.output_folder
    )
    if failed:
        logging.error("%d images failed: %s", len(failed), ", ".join(failed))
    return EXIT_BAD_INPUT if failed else 0


# ---------------------------------------------------------------------------------------------- many processes


class Shard(NamedTuple):
    """Which share of the images this process does: part 2 of 8 is every eighth, beginning with the second."""

    part: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Return ``"2/8"`` as a shard; the ``type`` of a command-line option."""
        part, _, parts = text.partition("/")
        if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise argparse.ArgumentTypeError(f"expected a part and the number of parts, such as 2/8, got {text!r}")
        return cls(int(part), int(parts))


def shard_from_slurm(environment: Mapping[str, str]) -> Shard:
    """Return the part of this process among the elements of a job array and the tasks of an ``srun``.

    Notes
    -----
    ``SLURM_STEP_NUM_TASKS`` is there under ``srun`` alone. ``SLURM_NTASKS`` and ``SLURM_PROCID`` are also set in a
    batch script, where a program that is started without ``srun`` runs once and has to do everything.
    """
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        least, step = int(environment["SLURM_ARRAY_TASK_MIN"]), int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        count = (int(environment["SLURM_ARRAY_TASK_MAX"]) - least) // step + 1
        index = (int(environment["SLURM_ARRAY_TASK_ID"]) - least) // step
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        index, count = index * tasks + int(environment["SLURM_PROCID"]), count * tasks
    return Shard(index + 1, count)


# ---------------------------------------------------------------------------------------------- the model


class TileTooLarge(Exception):
    """The network ran out of memory on a tile."""


@dataclass(frozen=True)
class Model:
    """A loaded SavedModel and what has to be known about it.

    Attributes
    ----------
    predict : callable
        From float32 (1, H, W, C) to softmax, ndarray of float32 (1, H, W, classes).
    channels, number_classes : int
    radius : int
        Pixels beyond each edge of a block of the pooling grid on which its results depend; the halo of a tile.
    size_factor : int
        Heights, widths and tile origins are multiples of it.
    features : int
        Of the network's top level; most of the memory it works in is proportional to it.
    """

    predict: Any
    channels: int
    number_classes: int
    radius: int
    size_factor: int
    features: int = PAPER_FEATURES

    @property
    def halo(self) -> int:
        """The radius, rounded up so that tiles start on the network's grid."""
        return -(-self.radius // self.size_factor) * self.size_factor

    @property
    def least_tile_size(self) -> int:
        """Edge of the smallest tile that keeps anything between its halos."""
        return 2 * self.halo + self.size_factor

    @property
    def mask_dtype(self) -> np.dtype:
        """Smallest unsigned type that holds the classes."""
        return np.min_scalar_type(self.number_classes - 1)


def load_model(filepath: str) -> Model:
    """Load a SavedModel with a ``serving_default`` signature.

    Raises
    ------
    InputError
        If the folder is missing or holds no such model.
    """
    folder = Path(filepath)
    if not (folder / "saved_model.pb").is_file():
        raise InputError(
            f"expected a SavedModel in {folder}, found no saved_model.pb; give the folder saved_model that "
            "train_unet.py wrote in its --output_dir"
        )
    import tensorflow as tf

    from unet_model import METADATA_FILE, RADIUS, SIZE_FACTOR

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    try:
        loaded = tf.saved_model.load(os.fspath(folder))
        signature = loaded.signatures["serving_default"]
        (input_name, input_spec), = signature.structured_input_signature[1].items()  # fmt: skip
        (output_name, output_spec), = signature.structured_outputs.items()  # fmt: skip
        channels, number_classes = input_spec.shape[3], output_spec.shape[3]
    except (OSError, KeyError, ValueError, IndexError, tf.errors.OpError) as error:
        raise InputError(
            f"{folder} is no SavedModel of a segmentation network ({error}); train one with train_unet.py"
        ) from error
    metadata_file = folder / METADATA_FILE
    metadata = json.loads(metadata_file.read_text()) if metadata_file.exists() else {}

    def predict(images: np.ndarray, _keep: Any = loaded) -> np.ndarray:
        try:
            return signature(**{input_name: tf.constant(images)})[output_name].numpy()
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise TileTooLarge from error

    return Model(
        predict,
        channels,
        number_classes,
        metadata.get("radius", RADIUS),
        metadata.get("size_factor", SIZE_FACTOR),
        metadata.get("baseline_feature_depth", PAPER_FEATURES),
    )


# ---------------------------------------------------------------------------------------------- the size of tiles


class TileSizer:
    """Chooses the shape of tiles, and remembers what turned out to be too large.

    Parameters
    ----------
    model : Model
    most : int
        Largest edge of a tile in pixels, halo included.

    Raises
    ------
    InputError
        If that is off the network's grid, or leaves nothing between the halos.
    """

    def __init__(self, model: Model, most: int) -> None:
        self._grid, self._halo, self.most = model.size_factor, model.halo, most
        self._least = model.least_tile_size
        if most % self._grid or most < self._least:
            raise InputError(
                f"expected --tile_size to be a multiple of {self._grid} and at least {self._least} (a halo of "
                f"{self._halo} to each side), got {most}; try 512 or 1024"
            )

    def edge(self, length: int) -> int:
        """Return the edge of the tiles along an axis of an image: as few as may be, and these as small as may be."""
        if length <= self.most:
            return length
        inner = length - 2 * self._halo  # what the zones cover besides a halo's breadth at both ends
        tiles = -(-inner // (self.most - 2 * self._halo))
        return -(-inner // (tiles * self._grid)) * self._grid + 2 * self._halo

    def halve(self) -> bool:
        """Make tiles half as large; False where they cannot get smaller."""
        if self.most == self._least:
            return False
        self.most = max(self.most // 2 // self._grid * self._grid, self._least)
        return True


def affordable_tile_size(model: Model) -> int:
    """Return the edge of a square tile for which the network needs `MEMORY_SHARE` of the free memory."""
    pixels = MEMORY_SHARE * free_memory() / (BYTES_PER_PIXEL_AND_FEATURE * model.features)
    edge = min(int(pixels**0.5), MAX_TILE_SIZE) // model.size_factor * model.size_factor
    return max(edge, model.least_tile_size)


def free_memory() -> float:
    """Return the bytes that are free on the fullest GPU, or where there is none in this computer and this job."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
            # TensorFlow would tell only after it has taken all of the memory.
            query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
            printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            return min(int(mebibytes) for mebibytes in printed.split()) * 2.0**20
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return float(min([available, *free_in_control_groups()]))


def free_in_control_groups() -> Iterator[int]:
    """Yield what is left of each memory limit that a batch system or container has put on this process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "memory":  # version 1 of control groups
                root, limit, used = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            elif not controllers:  # version 2
                root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
            else:
                continue
            folder = Path(root + group)
            for level in (folder, *folder.parents):  # a limit holds for everything below it
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max" for no limit
                    yield int((level / limit).read_text()) - int((level / used).read_text())


# ---------------------------------------------------------------------------------------------- one image


def segment_file(
    path: Path, target: Path, model: Model, sizer: TileSizer
) -> tuple[tuple[int, int, int], dict[int, int]]:
    """Segment an image file into a mask file; return the image's shape (H, W, C) and the pixels of each class."""
    from imagereader import ChannelStatistics, ImageFile

    with ImageFile(path, channels=model.channels) as image:
        if image.shape[2] != model.channels:
            raise InputError(
                f"expected {model.channels} channels, as the model was trained with, found {image.shape[2]} in {path}; "
                "choose the model or the images that belong together"
            )
        if image.dtype.kind not in "buif":
            raise InputError(f"expected integer or float pixels in {path}, found {image.dtype}; convert the image")
        statistics = ChannelStatistics.measure(image)
        while True:
            counts: Counter[int] = Counter()
            try:
                with contextlib.closing(ahead(segment(image, statistics, model, sizer))) as bands:
                    write_mask(target, count_bands(bands, counts), image, model.mask_dtype)
                return image.shape, dict(sorted(counts.items()))
            except TileTooLarge as error:
                if not sizer.halve():
                    raise InputError(f"{path} needs more memory than there is, even in the smallest tiles") from error
                logging.warning("out of memory: going on with tiles of at most %d pixels", sizer.most)


def segment(
    image: "ImageFile", statistics: "ChannelStatistics", model: Model, sizer: TileSizer
) -> Iterator[np.ndarray]:
    """Segment an image, reading it from top to bottom.

    Parameters
    ----------
    image : ImageFile
    statistics : ChannelStatistics
        Of the whole image.
    model : Model
    sizer : TileSizer

    Yields
    ------
    ndarray, shape (rows, W)
        Class ids of the next rows, in the smallest unsigned type that holds the model's classes.

    Notes
    -----
    A tile ends where the image ends: beyond that edge the whole image has no context either. So all tiles have one
    shape (each new one would cost TensorFlow a new trace), and those at the end are moved inwards.
    """
    height, width, _ = image.shape
    padded_height, padded_width = (-(-length // model.size_factor) * model.size_factor for length in (height, width))
    row_plan = list(plan_axis(padded_height, sizer.edge(padded_height), model.halo))
    column_plan = list(plan_axis(padded_width, sizer.edge(padded_width), model.halo))
    progress = Progress(f"segmenting {image.path.name}", len(row_plan) * len(column_plan), "tiles")
    done = 0
    reading = ahead(read_padded(image, rows, padded_width) for rows, _ in row_plan)
    # Closed here whatever happens: its thread must not go on reading when the image is begun anew in smaller tiles.
    with contextlib.closing(reading) as windows:
        for (rows, zone_rows), window in zip(row_plan, windows):
            band = np.empty((zone_rows.stop - zone_rows.start, padded_width), model.mask_dtype)
            for columns, zone_columns in column_plan:
                softmax = model.predict(statistics.z_score(window[:, columns])[None])
                kept = softmax[0, within(zone_rows, rows), within(zone_columns, columns)]
                band[:, zone_columns] = np.argmax(kept, axis=-1)
                done += 1
                progress.update(done)
            yield band[: height - zone_rows.start, :width]
    progress.close()


def read_padded(image: "ImageFile", rows: slice, padded_width: int) -> np.ndarray:
    """Return rows of an image, extended at its bottom and right by reflection to the network's grid."""
    height, width, _ = image.shape
    window = image.read(rows.start, min(rows.stop, height))
    missing = [(0, max(rows.stop - height, 0)), (0, padded_width - width), (0, 0)]
    return np.pad(window, missing, mode="reflect") if any(after for _, after in missing) else window


def within(zone: slice, window: slice) -> slice:
    """Return a zone, counted from the start of the window that holds it."""
    return slice(zone.start - window.start, zone.stop - window.start)


def plan_axis(length: int, tile_size: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """Yield (window, zone) along one axis."""
    size = min(tile_size, length)
    done = 0
    while done < length:
        start = min(max(done - halo, 0), length - size)
        end = start + size
        zone_end = length if end == length else end - halo
        yield slice(start, end), slice(done, zone_end)
        done = zone_end


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield items while a thread prepares the next one: reading, predicting and writing overlap."""
    with ThreadPoolExecutor(1) as executor:
        end = object()
        future = executor.submit(next, items, end)
        while (item := future.result()) is not end:
            future = executor.submit(next, items, end)
            yield item  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- masks on disk


def prepare_output_folder(folder: Path, image_folder: Path) -> None:
    """Create the output folder; refuse the one that the images are in, where masks would replace them."""
    if folder.exists() and folder.resolve() == image_folder.resolve():
        raise InputError(
            f"--output_folder {folder} is the image folder, the masks would replace the images; choose another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create --output_folder {folder}: {error.strerror}; choose another folder") from error


def mask_name(image: Path) -> str:
    """Return the file name of an image's mask: the image's own, but png for JPEG, which would change class ids."""
    return image.name if image.suffix.lower() in (".tif", ".tiff", ".png") else f"{image.stem}.png"


def write_mask(target: Path, bands: Iterator[np.ndarray], image: "ImageFile", dtype: np.dtype) -> None:
    """Write a mask as its rows come, so that it appears under its name only when whole.

    Parameters
    ----------
    target : path
        TIFF or PNG, by its extension; a PNG is gathered in memory first.
    bands : iterator of ndarray, shape (rows, W)
    image : ImageFile
        Gives the size, and the resolution where it has one.
    dtype : dtype
        Of the mask.
    """
    temporary = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        if target.suffix.lower() == ".png":
            from skimage.io import imsave

            imsave(temporary, np.concatenate(list(bands)), check_contrast=False)
        else:
            write_tiff(temporary, bands, image, dtype)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error}; free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tiff(path: Path, bands: Iterator[np.ndarray], image: "ImageFile", dtype: np.dtype) -> None:
    """Write a tiled, compressed TIFF from bands of rows."""
    import tifffile

    height, width, _ = image.shape
    resolution: dict[str, Any] = {}
    if image.resolution is not None:
        resolution = {"resolution": image.resolution[:2], "resolutionunit": image.resolution[2]}
    tifffile.imwrite(
        path,
        cut_into_tiles(bands, width, dtype),
        shape=(height, width),
        dtype=dtype,
        tile=(MASK_TILE, MASK_TILE),
        compression="zlib",
        photometric="minisblack",
        bigtiff=height * width * dtype.itemsize > BIGTIFF_FROM_BYTES,
        **resolution,
    )


def cut_into_tiles(bands: Iterator[np.ndarray], width: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the tiles of a TIFF, row by row of tiles, filled up with zeros at the right and the bottom."""
    columns = range(0, width, MASK_TILE)
    rows = np.zeros((MASK_TILE, len(columns) * MASK_TILE), dtype)
    filled = 0
    for band in bands:
        while len(band):
            taken = min(MASK_TILE - filled, len(band))
            rows[filled : filled + taken, :width] = band[:taken]
            band, filled = band[taken:], filled + taken
            if filled == MASK_TILE:
                yield from (rows[:, column : column + MASK_TILE].copy() for column in columns)
                filled = 0
    if filled:
        rows[filled:] = 0
        yield from (rows[:, column : column + MASK_TILE].copy() for column in columns)


def count_bands(bands: Iterator[np.ndarray], counts: "Counter[int]") -> Iterator[np.ndarray]:
    """Pass bands of a mask on, adding the pixels of each class to `counts`."""
    for band in bands:
        counts.update(count_classes(band))
        yield band


def describe_histogram(counts: dict[int, int]) -> str:
    """Return the share of each class in words; an all-background result should be seen at once."""
    total = sum(counts.values())
    return ", ".join(f"class {class_id}: {100 * count / total:.1f} %" for class_id, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
