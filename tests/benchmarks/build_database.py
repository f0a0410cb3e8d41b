"""Time database builds with one and two processes, against reading the same files and writing their bytes.

    python tests/benchmarks/build_database.py --images 1000

The contestants take turns, and each ratio is computed within a turn. Two processes cannot gain more than two cores do.
The last row shows this limit: the gain of two independent programs, each reading half of the files, over one program
that reads all.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from common import ROOT, finish, machine, make_parser, summarize

from cli import positive_int

PEER = """
import sys, pathlib, tifffile
folder, output, first, step = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with open(output, "wb") as file:
    for path in sorted((folder / "images").iterdir())[first::step]:
        file.write(tifffile.imread(path).tobytes())
        file.write(tifffile.imread(folder / "masks" / path.name).tobytes())
"""


def write_images(folder, count):
    """Write LZW images of 512 x 512 uint16 pixels with camera-like noise, and masks of stripes."""
    rng = np.random.default_rng(0)
    mask = (np.add.outer(np.arange(512), np.arange(512)) // 60 % 2).astype(np.uint8)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(count):
        image = (1000 + 500.0 * mask + rng.normal(0, 60, mask.shape)).astype(np.uint16)
        tifffile.imwrite(folder / "images" / f"{index:06d}.tif", image, compression="lzw")
        tifffile.imwrite(folder / "masks" / f"{index:06d}.tif", mask, compression="lzw")


def seconds(*commands):
    """Run commands at the same time; return the seconds until all have finished."""
    start = time.perf_counter()
    processes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) for command in commands]
    if any(process.wait() for process in processes):
        raise RuntimeError("a command failed")
    return time.perf_counter() - start


def measure(folder, turns):
    """Return the seconds of each contestant in each turn."""
    peer = [sys.executable, "-c", PEER, folder]
    build = [sys.executable, ROOT / "build_lmdb.py", "--image_folder", folder / "images", "--mask_folder",
             folder / "masks", "--output_folder", folder / "out", "--num_workers"]  # fmt: skip
    times = {"peer": [], "one": [], "two": [], "two_peers": []}
    for _ in range(turns):
        times["peer"].append(seconds([*peer, folder / "a", 0, 1]))
        times["one"].append(seconds([*build, 1]))
        times["two"].append(seconds([*build, 2]))
        times["two_peers"].append(seconds([*peer, folder / "a", 0, 2], [*peer, folder / "b", 1, 2]))
    return times


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive_int, default=1000, help="number of images")
    parser.add_argument("--turns", type=positive_int, default=5, help="number of measurements; the median counts")
    parser.add_argument("--folder", help="folder to work in; the system's temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_images(Path(folder), args.images)
        times = measure(Path(folder), args.turns)

    def ratio(one, other):
        return statistics.median(a / b for a, b in zip(times[one], times[other]))

    results = {
        **{f"{name}_seconds": summarize(values) for name, values in times.items()},
        "one_process_over_peer": ratio("one", "peer"),
        "one_process_over_two": ratio("one", "two"),
        "one_peer_over_two": ratio("peer", "two_peers"),
    }
    if not args.json:
        print(machine())
        for name, value in results.items():
            shown = (
                f"{value:8.2f}" if isinstance(value, float) else "{:8.2f} ({:.2f} to {:.2f})".format(*value.values())
            )
            print(f"{name.replace('_', ' '):24} {shown}")
    finish(results, args.json)


if __name__ == "__main__":
    main()
