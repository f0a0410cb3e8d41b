"""Shared parts of the benchmarks: the import path, synthetic databases, and output as text or JSON."""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
UNLIMITED = dict(os.environ)  # for programs that may use any number of threads
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # as in a reader; numpy's libraries read this when they are loaded

import numpy as np

from image_files import ChannelStatistics
from lmdb_utils import Record, new_databases

logging.getLogger().addHandler(logging.NullHandler())  # hide starvation warnings, as consumers here never wait

CASES = ("256:1:uint16", "512:1:uint8", "256:3:uint8")


def make_parser(description):
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    return parser


def parse_case(text):
    """Return the size in pixels, number of channels and dtype of a case such as ``256:1:uint16``."""
    size, channels, dtype = text.split(":")
    return int(size), int(channels), np.dtype(dtype)


def random_pair(rng, case):
    """Return a random image (H, W, C) over most of its type's range, and a random mask of classes 0 and 1."""
    size, channels, dtype = parse_case(case)
    image = rng.random((size, size, channels)) * (60000 if dtype == np.uint16 else 255)
    return image.astype(dtype), (rng.random((size, size)) > 0.5).astype(np.uint8)


def record_of(image, mask):
    """Return the record of an image without missing data."""
    statistics = ChannelStatistics.measure([image])
    return Record.encode(image, mask, statistics.mean, statistics.deviation)


@contextlib.contextmanager
def synthetic_database(case, count=32):
    """Yield the path of a database of `count` random pairs; remove the database afterwards."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        filepath = Path(folder) / "train-synthetic.lmdb"
        with new_databases(filepath) as [writer]:
            for index in range(count):
                writer.append(record_of(*random_pair(rng, case)), f"{index}.tif")
            writer.finish({})
        yield filepath


def summarize(values):
    """Return the median, least and greatest of some measurements."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def machine():
    """Return a description of the machine."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith(("model name", "cpu\t"))), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"


def finish(results, as_json):
    """Print the results as one JSON line if `as_json` is true."""
    if as_json:
        print(json.dumps({"machine": machine(), **results}))
