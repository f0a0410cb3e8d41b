"""Time a training step on batches from readers, against the same step on one constant batch.

    python tests/benchmarks/training_step.py --pin 1

The benchmark uses the GPUs of the node, or its CPU. It also reports the images per second that the network takes and a
reader delivers, the number of readers that the network needs, the host time of a step, and the speed of each precision
with and without XLA. With ``--pin 1``, TensorFlow gets the first half of the cores and the readers get the rest, as on
a node whose GPUs do the computing. On a node without a GPU, the two would otherwise compete for every core.
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
    """A log handler that counts the readers' starvation messages."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        """Count a log record if it reports starvation."""
        self.count += "Starvation !!!!" in record.getMessage()


def split_cores(pin):
    """Return the cores for TensorFlow and the cores for the readers."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if pin and half else (cores, cores)


def time_steps(trainer, next_batch, steps):
    """Return seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
        loss = trainer.train_step(next_batch())
    loss.numpy()  # waits for the queued steps
    return (time.perf_counter() - start) / steps


def make_trainer(args, channels, depth, mixed=False, xla=False):
    """Return a trainer with the given precision, with or without XLA."""
    from unet_model import Loss, UNetTrainer, build_unet

    precision = "mixed_float16" if mixed else "float32"
    return UNetTrainer(
        args.strategy,
        lambda key: build_unet(channels, 2, depth, 0.0, precision=precision, deep_supervision=True),
        1e-4,
        Loss(2, with_dice=True),
        average_weights=True,
        loss_scaling=mixed,
        xla=xla,
    )


def time_constant(args, trainer, batch):
    """Return the seconds per step of each run, for steps on one constant batch."""
    time_steps(trainer, lambda: batch, 5)
    return [time_steps(trainer, lambda: batch, args.steps) for _ in range(args.runs)]


def measure_host(args):
    """Return milliseconds per step of a network so small that Python and the launch of operations take all the time."""
    import numpy as np
    import tensorflow as tf

    arrays = np.ones((1, 16, 16, 1), np.float32), np.zeros((1, 16, 16), np.uint8), np.ones(1, np.float32)
    result = {}
    for xla in (False, True)[: 1 + (args.strategy.num_replicas_in_sync == 1)]:
        trainer = make_trainer(args, 1, 1, xla=xla)
        batch = next(iter(args.strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(arrays))))
        milliseconds = [1000 * seconds for seconds in time_constant(args, trainer, batch)]
        result["with XLA" if xla else "without XLA"] = summarize(milliseconds)
    return result


def measure_speed(args, batch, channels, pixels):
    """Return the milliseconds, images and megapixels per second for each precision, with and without XLA."""
    result = {}
    for mixed in (False, True):
        for xla in (False, True)[: 1 + (args.strategy.num_replicas_in_sync == 1)]:
            trainer = make_trainer(args, channels, args.baseline_feature_depth, mixed, xla)
            seconds = time_constant(args, trainer, batch)
            images = args.batch_size * trainer.num_replicas / statistics.median(seconds)
            result[f"{'mixed' if mixed else 'float32'}{', XLA' if xla else ''}"] = {
                "milliseconds": summarize([1000 * value for value in seconds]),
                "images_per_second": images,
                "megapixels_per_second": images * pixels / 1e6,
            }
    return result


def measure(args, database):
    """Return the figures of one comparison."""
    network_cores, reader_cores = split_cores(args.pin)
    os.sched_setaffinity(0, reader_cores)  # inherited by the reader processes, which start now
    per_reader = statistics.median(measure_reader(database, 1, True, 50, args.batch_size) for _ in range(args.runs))
    starvation = StarvationCounter()
    logging.getLogger().addHandler(starvation)
    with ImageReader(database, True, num_workers=args.readers, batch_size=args.batch_size) as reader:
        os.sched_setaffinity(0, network_cores)  # before TensorFlow counts the cores and starts its threads
        from train_unet import Cluster, make_strategy, open_supply

        args.strategy = make_strategy(Cluster())
        height, width, channels = reader.get_image_size()
        trainer = make_trainer(args, channels, args.baseline_feature_depth)
        with open_supply(trainer, reader) as batches:
            constant = batches.next_batch()
            time_steps(trainer, batches.next_batch, 10)
            seconds = {"constant": [], "readers": []}
            for _ in range(args.runs):
                seconds["constant"].append(time_steps(trainer, lambda: constant, args.steps))
                seconds["readers"].append(time_steps(trainer, batches.next_batch, args.steps))
            speed = measure_speed(args, constant, channels, height * width) if args.compare else {}
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
        "host_milliseconds": measure_host(args),
        "speed": speed,
    }


def main():
    """Measure and print."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--case", default="128:1:uint16", help="SIZE:CHANNELS:DTYPE of the images")
    parser.add_argument("--readers", type=positive_int, default=1, help="number of readers")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="images in the batch of each GPU")
    parser.add_argument("--baseline_feature_depth", type=positive_int, default=16, help="features of the top level")
    parser.add_argument("--steps", type=positive_int, default=50, help="number of steps in a measurement")
    parser.add_argument("--runs", type=positive_int, default=5, help="number of measurements; the median counts")
    add_flag(parser, "--compare", 1, "also measure each precision with and without XLA [0 = false, 1 = true]")
    add_flag(parser, "--pin", 0, "separate cores for network and readers [0 = false, 1 = true]")
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as train_unet.py does
    with synthetic_database(args.case) as database:
        results = measure(args, database)
    if not args.json:
        print(machine())
        for name in ("constant_milliseconds", "readers_milliseconds"):
            median, least, greatest = results[name].values()
            print(f"{name.replace('_', ' '):34} {median:8.2f} ({least:.2f} to {greatest:.2f})")
        for name in list(results)[2:-2]:
            print(f"{name.replace('_', ' '):34} {results[name]:8.3g}")
        for name, summary in results["host_milliseconds"].items():
            median, least, greatest = summary.values()
            print(f"host milliseconds {name:16} {median:8.2f} ({least:.2f} to {greatest:.2f})")
        for name, figures in results["speed"].items():
            print(
                f"{name:34} {figures['milliseconds']['median']:8.2f} ms, {figures['images_per_second']:.1f} images/s, "
                f"{figures['megapixels_per_second']:.2f} megapixels/s"
            )
    finish(results, args.json)


if __name__ == "__main__":
    main()
