"""Time of a training step on batches from readers, against the same step on one batch again and again.

    python tests/benchmarks/training_step.py --pin 1

Uses the GPUs of the node, or its CPU. Also tells how many images per second the network takes, how many a reader
delivers, and so how many readers it needs. With ``--pin 1`` TensorFlow gets the first half of the cores and the readers
get the others, as on a node where GPUs do the computing; without a GPU the two would fight for every core otherwise.
"""

import logging
import math
import os
import statistics
import time

from common import finish, machine, make_parser, summarize, synthetic_database
from reader_throughput import measure_reader

from cli import add_flag, positive_int
from imagereader import ImageReader


class StarvationCounter(logging.Handler):
    """Counts the readers' starvation messages."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        """Look at a log record."""
        self.count += "Starvation !!!!" in record.getMessage()


def split_cores(pin):
    """Return the cores for TensorFlow and those for the readers."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if pin and half else (cores, cores)


def time_steps(trainer, next_batch, steps):
    """Return seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next_batch())
    return (time.perf_counter() - start) / steps


def measure(args, database):
    """Return the figures of one comparison."""
    network_cores, reader_cores = split_cores(args.pin)
    os.sched_setaffinity(0, reader_cores)  # inherited by the processes that are started now
    per_reader = statistics.median(measure_reader(database, 1, True, 50, args.batch_size) for _ in range(args.runs))
    starvation = StarvationCounter()
    logging.getLogger().addHandler(starvation)
    with ImageReader(database, True, num_workers=args.readers, batch_size=args.batch_size) as reader:
        os.sched_setaffinity(0, network_cores)  # before TensorFlow counts them and starts its threads
        from train_unet import Cluster, make_strategy, open_supply
        from unet_model import UNetTrainer, build_unet

        channels = reader.get_image_size()[2]
        depth = args.baseline_feature_depth
        trainer = UNetTrainer(
            make_strategy(Cluster()), lambda key: build_unet(channels, 2, depth, dropout_key=key), 2, 1e-4
        )
        with open_supply(trainer, reader) as batches:
            constant = batches.next_batch()
            time_steps(trainer, batches.next_batch, 10)
            seconds = {"constant": [], "readers": []}
            for _ in range(args.runs):
                seconds["constant"].append(time_steps(trainer, lambda: constant, args.steps))
                seconds["readers"].append(time_steps(trainer, batches.next_batch, args.steps))
    images_per_second = args.batch_size * trainer.num_replicas / statistics.median(seconds["constant"])
    return {
        "constant_milliseconds": summarize([1000 * value for value in seconds["constant"]]),
        "readers_milliseconds": summarize([1000 * value for value in seconds["readers"]]),
        "ratio": statistics.median(seconds["readers"]) / statistics.median(seconds["constant"]),
        "starvation_messages": starvation.count,
        "replicas": trainer.num_replicas,
        "images_per_second_of_the_network": images_per_second,
        "images_per_second_of_a_reader": per_reader,
        "readers_needed": math.ceil(images_per_second / per_reader),
    }


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--case", default="128:1:uint16", help="SIZE:CHANNELS:DTYPE of the images")
    parser.add_argument("--readers", type=positive_int, default=1, help="number of readers")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="images in a batch, for each GPU")
    parser.add_argument("--baseline_feature_depth", type=positive_int, default=16, help="features of the top level")
    parser.add_argument("--steps", type=positive_int, default=50, help="steps in a measurement")
    parser.add_argument("--runs", type=positive_int, default=5, help="measurements, of which the median counts")
    add_flag(parser, "--pin", 0, "cores of their own for network and readers [0 = false, 1 = true]")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with synthetic_database(args.case) as database:
        results = measure(args, database)
    if not args.json:
        print(machine())
        for name in ("constant_milliseconds", "readers_milliseconds"):
            median, least, greatest = results[name].values()
            print(f"{name.replace('_', ' '):34} {median:8.2f} ({least:.2f} to {greatest:.2f})")
        for name in list(results)[2:]:
            print(f"{name.replace('_', ' '):34} {results[name]:8.3g}")
    finish(results, args.json)


if __name__ == "__main__":
    main()
