"""Measure the cost of a reader before its first batch: time to open a large database, time to start, and memory.

python tests/benchmarks/reader_startup.py
"""

import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from common import finish, machine, make_parser, record_of, synthetic_database

from cli import positive_int
from imagereader import ImageReader
from lmdb_utils import Database, new_databases


def write_tiny_records(filepath, count):
    """Write a database of `count` images of 16 x 16 pixels with different names and three classes."""
    image, mask = np.zeros((16, 16, 1), np.uint8), np.zeros((16, 16), np.uint8)
    with new_databases(filepath) as [writer]:
        for index in range(count):
            mask[0, 0] = index % 3
            writer.append(record_of(image, mask), f"an_image_with_a_name_as_long_as_they_are_{index:07d}.tif")
        writer.finish({})


def median_seconds(work, runs):
    """Return the median time of a call."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_reader(database, **options):
    """Return the seconds until the first batch, and the worker's anonymous memory in MiB."""
    start = time.perf_counter()
    with ImageReader(database, use_augmentation=True, batch_size=4, **options) as reader:
        next(reader.generator())
        seconds = time.perf_counter() - start
        [worker] = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        status = Path(f"/proc/{worker.pid}/status").read_text()
        return seconds, int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 2**10


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--records", type=positive_int, default=1_000_000, help="records in the large database")
    parser.add_argument("--runs", type=positive_int, default=5, help="number of measurements; the median counts")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (100, args.records):
            filepath = Path(folder) / f"train-{count}.lmdb"
            write_tiny_records(filepath, count)
            results[f"open_{count}_seconds"] = median_seconds(lambda path=filepath: Database(path).close(), args.runs)
            options = {"balance_classes": True, "number_classes": 3}
            figures = [measure_reader(filepath, **options) for _ in range(args.runs)]
            results[f"first_batch_{count}_seconds"] = statistics.median(seconds for seconds, _ in figures)
            results[f"worker_{count}_mib"] = max(memory for _, memory in figures)
    with synthetic_database("512:1:uint8") as database:
        figures = [measure_reader(database) for _ in range(args.runs)]
    results["first_batch_512_seconds"] = statistics.median(seconds for seconds, _ in figures)
    results["worker_512_mib"] = max(memory for _, memory in figures)
    if not args.json:
        print(machine())
        for name, value in results.items():
            print(f"{name.replace('_', ' '):34} {value:8.3f}")
    finish(results, args.json)


if __name__ == "__main__":
    main()
