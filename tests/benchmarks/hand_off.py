"""Time the hand-off of a batch from shared memory to a TensorFlow tensor, against copying its bytes once.

    python tests/benchmarks/hand_off.py

The queue and TensorFlow's own small queue are full when the clock starts, so that nothing waits for a reader.
"""

import itertools
import os
import time

import numpy as np
from common import finish, machine, make_parser, parse_case, summarize, synthetic_database

from cli import positive_int
from imagereader import ImageReader


def take_full_queue(reader, stream):
    """Empty a full queue; return the seconds per batch."""
    capacity = reader.get_queue_capacity()
    while reader.get_queue_size() < capacity:
        time.sleep(0.01)
    time.sleep(0.1)
    start = time.perf_counter()
    for _ in itertools.islice(stream, capacity):
        pass
    return (time.perf_counter() - start) / capacity


def copy_once(source, targets):
    """Copy blocks of memory into a smaller set of targets in turn; return the seconds per block."""
    start = time.perf_counter()
    for index, block in enumerate(source):
        np.copyto(targets[index % len(targets)], block)
    return (time.perf_counter() - start) / len(source)


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--case", default="512:1:uint8", help="SIZE:CHANNELS:DTYPE of the images")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="images in a batch")
    parser.add_argument("--runs", type=positive_int, default=7, help="number of measurements; the median counts")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    size, channels, _ = parse_case(args.case)
    batch_bytes = args.batch_size * size * size * (4 * channels + 1)
    seconds = {"memcpy": [], "numpy arrays": [], "tensors": []}
    with synthetic_database(args.case) as database, ImageReader(database, batch_size=args.batch_size) as arrays:
        with ImageReader(database, batch_size=args.batch_size) as tensors:
            streams = arrays.generator(), iter(tensors.get_tf_dataset())
            source = np.ones((arrays.get_queue_capacity(), batch_bytes), np.uint8)
            targets = np.ones((4, batch_bytes), np.uint8)
            for reader, stream in zip((arrays, tensors), streams):
                take_full_queue(reader, stream)  # the first pass touches new memory
            for _ in range(args.runs):
                seconds["memcpy"].append(copy_once(source, targets))
                seconds["numpy arrays"].append(take_full_queue(arrays, streams[0]))
                seconds["tensors"].append(take_full_queue(tensors, streams[1]))
            tensors.shutdown()  # before TensorFlow destroys its iterator, which would wait for the generator
            for _ in streams[1]:
                pass
    results = {"batch_mib": batch_bytes / 2**20}
    results.update({f"{name} milliseconds": summarize([1000 * value for value in seconds[name]]) for name in seconds})
    results["memcpys"] = results["tensors milliseconds"]["median"] / results["memcpy milliseconds"]["median"]
    if not args.json:
        print(f"{machine()}\nbatches of {results['batch_mib']:.1f} MiB")
        for name in seconds:
            median, least, greatest = results[f"{name} milliseconds"].values()
            print(f"{name:14} {median:7.2f} ms per batch ({least:.2f} to {greatest:.2f})")
        print(f"a tensor costs {results['memcpys']:.2f} memcpys")
    finish(results, args.json)


if __name__ == "__main__":
    main()
