r"""Train a U-Net on the databases that build_lmdb.py made.

    python train_unet.py --train_database data/train-cells.lmdb --test_database data/test-cells.lmdb \
        --output_dir results/cells --number_classes 2

Owns the training loop, checkpoints, early stopping and logs. TensorFlow is imported inside functions: the spawned
reader processes import this file again and must not pay for it, and ``-h`` should answer at once.
"""

import argparse
import contextlib
import csv
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from lmdb_utils import (
    InputError,
    Metadata,
    Progress,
    add_flag,
    configure_logging,
    log_settings,
    positive_int,
    run_script,
    seed_int,
)

if TYPE_CHECKING:
    from imagereader import ImageReader
    from unet_model import UNetTrainer

WARM_UP_FACTOR = 0.1  # of the learning rate, in the first epoch
WARM_UP_STEPS = 1000  # at most
EARLY_STOPPING_DELTA = 1e-4  # a test loss must fall by more than this to count as an improvement
CHECKPOINTS_KEPT = 2
ADVISE_WAIT_SHARE, ADVISE_QUEUE_FILL = 0.05, 0.5  # more waiting than this with an emptier queue: readers are too slow
EXIT_FAILURE = 1


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="train_unet",
        description="Script which trains a unet model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_options(parser.add_argument_group("data"))
    add_training_options(parser.add_argument_group("training"))
    add_run_options(parser.add_argument_group("network and run"))
    return parser


def add_data_options(group: Any) -> None:
    """Add the required options: where the data is and where results go."""
    required = {"required": True, "default": argparse.SUPPRESS}
    for side, use in (("train", "for training"), ("test", "for testing")):
        metavar = f"{side.upper()}_DATABASE_FILEPATH"
        group.add_argument(
            f"--{side}_database", metavar=metavar, **required, help=f"lmdb database to use {use} (Required)"
        )
    text = "Folder where outputs will be saved (Required)"
    group.add_argument("--output_dir", metavar="OUTPUT_FOLDER", type=Path, **required, help=text)


def add_training_options(group: Any) -> None:
    """Add what the specification lists besides the data."""
    group.add_argument("--batch_size", type=positive_int, default=4, help="training batch size, for each GPU")
    group.add_argument("--number_classes", type=positive_int, default=2, help="classes, background (0) included")
    group.add_argument("--learning_rate", type=positive_float, default=3e-4, help="of the Adam optimizer")
    group.add_argument(
        "--test_every_n_steps",
        type=positive_int,
        default=1000,
        help="number of gradient update steps to take between test epochs",
    )
    text = "whether to balance classes [0 = false, 1 = true]: each is drawn equally often, then an image that holds it"
    add_flag(group, "--balance_classes", 0, text)
    add_flag(group, "--use_augmentation", 1, "whether to use data augmentation [0 = false, 1 = true]")
    group.add_argument(
        "--early_stopping",
        metavar="EARLY_STOPPING_COUNT",
        type=positive_int,
        default=10,
        help="Perform early stopping when the test loss does not improve for N epochs.",
    )
    group.add_argument(
        "--reader_count",
        type=positive_int,
        default=1,
        help="how many processes to use for disk I/O and augmentation per gpu",
    )


def add_run_options(group: Any) -> None:
    """Add options beyond the specification."""
    group.add_argument(
        "--baseline_feature_depth",
        type=positive_int,
        default=64,
        help="features of the network's top level, doubled at each of the four levels below; fewer for small computers",
    )
    text = "stop after so many test epochs (None = no limit)"
    group.add_argument("--max_epochs", type=positive_int, default=None, help=text)
    text = "seed of the image order, the augmentation and the network's first weights"
    group.add_argument("--seed", type=seed_int, default=0, help=text)


def positive_float(text: str) -> float:
    """Return `text` as a finite number above 0; the ``type`` of command-line options."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, such as 3e-4, got {text!r}")
    return value


def main(argv: Optional[list[str]] = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    configure_logging()
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check the input, then train with readers that are stopped however the training ends."""
    from imagereader import ImageReader, ReaderError

    train_metadata, test_metadata = read_metadata(args)
    prepare_output_dir(args.output_dir)
    log_settings(args)
    strategy = make_strategy()
    replicas = strategy.num_replicas_in_sync
    shared = {
        "num_workers": args.reader_count * replicas,
        "number_classes": args.number_classes,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    train_reader = ImageReader(
        args.train_database,
        use_augmentation=bool(args.use_augmentation),
        balance_classes=bool(args.balance_classes),
        shuffle=True,
        name="train reader",
        **shared,
    )
    test_reader = ImageReader(
        args.test_database,
        use_augmentation=False,
        balance_classes=False,
        shuffle=False,
        name="test reader",
        pass_batches_multiple=replicas,
        **shared,
    )
    write_settings(args, train_metadata, test_metadata, replicas)
    try:
        with train_reader, test_reader:
            train(args, strategy, train_reader, test_reader)
    except TrainingError as error:
        logging.error("%s", error)
        return EXIT_FAILURE
    except ReaderError:  # logged in full when it happened
        logging.error("training stopped, because a reader failed (see above); what was saved before is kept")
        return EXIT_FAILURE
    return 0


# ---------------------------------------------------------------------------------------------- preparation


def read_metadata(args: argparse.Namespace) -> tuple[Metadata, Metadata]:
    """Return the metadata of both databases, which must hold images of one kind."""
    from imagereader import check_classes
    from lmdb_utils import Database
    from unet_model import SIZE_FACTOR

    found = []
    for filepath in (args.train_database, args.test_database):
        with Database(filepath) as database:
            found.append(database.metadata)
        check_classes(found[-1], args.number_classes, filepath)
    train, test = found
    if train.image_shape != test.image_shape:
        raise InputError(
            f"expected images of one size in both databases, found {train.image_shape} in {args.train_database} and "
            f"{test.image_shape} in {args.test_database}; build them together with build_lmdb.py"
        )
    height, width, _ = train.image_shape
    if height % SIZE_FACTOR or width % SIZE_FACTOR:
        raise InputError(
            f"expected image sizes that are multiples of {SIZE_FACTOR}, found {height} x {width}; build again"
        )
    return train, test


def prepare_output_dir(folder: Path) -> None:
    """Create the output folder, refuse one that holds another run, and start the log file in it."""
    if (folder / "metrics.csv").exists():
        raise InputError(
            f"{folder} holds a finished or interrupted run already; choose another --output_dir or move it away"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log_file = logging.FileHandler(folder / "train.log")
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}; choose another folder") from error
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(log_file)


def make_strategy() -> Any:
    """Return a MirroredStrategy over all visible GPUs, or over the CPU where there is none, and say which."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        logging.info("training on %d GPU%s: %s", len(gpus), "s" * (len(gpus) > 1), ", ".join(gpu.name for gpu in gpus))
        return tf.distribute.MirroredStrategy()
    logging.info("training on the CPU: TensorFlow %s sees no GPU", tf.__version__)
    return tf.distribute.MirroredStrategy(["CPU:0"])


def write_settings(args: argparse.Namespace, train: Metadata, test: Metadata, replicas: int) -> None:
    """Write settings.json: every option, and what is needed to know later what was trained on what."""
    import tensorflow as tf

    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "replicas": replicas,
        "global_batch_size": args.batch_size * replicas,
        "tensorflow_version": tf.__version__,
        "train_data": train.info,
        "test_data": test.info,
    }
    (args.output_dir / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def saved_model_metadata(args: argparse.Namespace, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return what inference must know about the network."""
    from unet_model import RADIUS, SIZE_FACTOR

    return {
        "number_classes": args.number_classes,
        "channels": image_shape[2],
        "radius": RADIUS,
        "size_factor": SIZE_FACTOR,
        "normalization": "z-score of each image and channel; only centred where the standard deviation is at most 1",
        "baseline_feature_depth": args.baseline_feature_depth,
    }


# ---------------------------------------------------------------------------------------------- training


class TrainingError(RuntimeError):
    """The training cannot go on; the message says at which step and why."""


@dataclass
class EarlyStopping:
    """Follows the test loss.

    Attributes
    ----------
    patience : int
        Test epochs without improvement after which to stop.
    best_loss : float
        Lowest test loss so far.
    epochs_without_improvement : int
        Since the loss last fell by more than `EARLY_STOPPING_DELTA` below the loss of the epoch that last did so.
    """

    patience: int
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    _reference_loss: float = field(default=math.inf, repr=False)

    def update(self, test_loss: float) -> bool:
        """Take note of a test loss; return whether it is the best so far."""
        if test_loss < self._reference_loss - EARLY_STOPPING_DELTA:
            self._reference_loss, self.epochs_without_improvement = test_loss, 0
        else:
            self.epochs_without_improvement += 1
        is_best = test_loss < self.best_loss
        self.best_loss = min(self.best_loss, test_loss)
        return is_best

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.epochs_without_improvement >= self.patience


def train(args: argparse.Namespace, strategy: Any, train_reader: "ImageReader", test_reader: "ImageReader") -> None:
    """Train until the test loss stops improving or `max_epochs` is reached; keep the best model."""
    import tensorflow as tf

    from unet_model import UNetTrainer, build_unet, export_saved_model

    tf.keras.utils.set_random_seed(args.seed)
    image_shape = train_reader.get_image_size()
    trainer = UNetTrainer(
        strategy,
        lambda: build_unet(image_shape[2], args.number_classes, args.baseline_feature_depth),
        args.number_classes,
        args.learning_rate,
    )
    logging.info(
        "network of %s weights, global batch of %d images",
        f"{trainer.model.count_params():,}",
        args.batch_size * trainer.num_replicas,
    )
    checkpoint = tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer)
    manager = tf.train.CheckpointManager(checkpoint, os.fspath(args.output_dir / "checkpoint"), CHECKPOINTS_KEPT)
    report = Report(args.output_dir, args.number_classes)
    stopping = EarlyStopping(args.early_stopping)
    epoch = step = 0
    with open_batches(trainer, train_reader) as train_batches, open_batches(trainer, test_reader) as test_batches:
        while not stopping.should_stop and (args.max_epochs is None or epoch < args.max_epochs):
            epoch += 1
            train_figures = train_one_epoch(args, trainer, train_reader, train_batches, epoch, step)
            step += args.test_every_n_steps
            test_figures = evaluate(trainer, test_reader, test_batches)
            is_best = stopping.update(test_figures["loss"])
            report.write(epoch, step, train_figures, test_figures, is_best)
            manager.save(checkpoint_number=epoch)
            if is_best:
                metadata = saved_model_metadata(args, image_shape)
                export_saved_model(trainer.model, args.output_dir / "saved_model", metadata)
    reason = (
        f"the test loss has not improved for {args.early_stopping} epochs"
        if stopping.should_stop
        else "last epoch reached"
    )
    logging.info(
        "done: %s; best test loss %.4f; the model is in %s", reason, stopping.best_loss, args.output_dir / "saved_model"
    )


@contextlib.contextmanager
def open_batches(trainer: "UNetTrainer", reader: "ImageReader") -> Iterator[Any]:
    """Yield an endless iterator over global batches; stop the reader and run the iterator dry at the end.

    TensorFlow destroys an iterator in the thread that drops it, with Python's lock held, and waits there for its
    prefetching threads. If one of these is about to call the generator, it waits for that lock: the program hung for a
    minute after the last epoch. A generator that has ended is not called again.
    """
    batches = trainer.distribute(reader)
    try:
        yield batches
    finally:
        reader.shutdown()
        with contextlib.suppress(Exception):  # a failed reader ends the stream with its error, reported already
            for _ in batches:
                pass


def train_one_epoch(
    args: argparse.Namespace, trainer: "UNetTrainer", reader: "ImageReader", batches: Any, epoch: int, first_step: int
) -> dict[str, float]:
    """Take `test_every_n_steps` steps; return mean loss, images/s, learning rate, and the figures of `Supply`.

    Raises
    ------
    TrainingError
        If the loss is not finite.
    """
    images_per_step = args.batch_size * trainer.num_replicas
    progress = Progress(f"epoch {epoch} step", args.test_every_n_steps, "", images_per_step, "images")
    supply = Supply(batches, reader)
    losses, start = [], time.monotonic()
    for step in range(args.test_every_n_steps):
        learning_rate = learning_rate_at(first_step + step, args)
        trainer.optimizer.learning_rate = learning_rate
        losses.append(float(trainer.train_step(supply.take())))
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"the loss became {losses[-1]} at step {first_step + step + 1} (learning rate {learning_rate:g}); "
                "what was saved before is kept. Lower --learning_rate and look for broken images"
            )
        progress.update(step + 1, f"loss {losses[-1]:.4f}, {supply},")
    progress.close()
    supply.advise(args.reader_count)
    return {
        "loss": float(np.mean(losses)),
        "images_per_second": args.test_every_n_steps * images_per_step / (time.monotonic() - start),
        "learning_rate": learning_rate,
        **supply.figures(),
    }


class Supply:
    """Takes global batches from the readers, and measures how well these keep up."""

    def __init__(self, batches: Any, reader: "ImageReader") -> None:
        self._batches, self._reader = batches, reader
        self._start = time.monotonic()
        self._waited = self._fill = 0.0
        self._taken = 0

    def take(self) -> Any:
        """Return the next global batch."""
        self._fill += self._reader.get_queue_size() / self._reader.get_queue_capacity()
        self._taken += 1
        asked = time.monotonic()
        batch = take(self._batches, self._reader)
        self._waited += time.monotonic() - asked
        return batch

    def figures(self) -> dict[str, float]:
        """Return mean fill of the queue (0 to 1), mean wait for a batch, and the share of the time spent waiting."""
        return {
            "reader/queue_fill": self._fill / max(self._taken, 1),
            "reader/wait_milliseconds": 1000 * self._waited / max(self._taken, 1),
            "reader/wait_share": self._waited / max(time.monotonic() - self._start, 1e-9),
        }

    def __str__(self) -> str:
        """Return the figures in words."""
        figures = self.figures()
        return f"queue {figures['reader/queue_fill']:.0%} full, waited for data {figures['reader/wait_share']:.0%}"

    def advise(self, reader_count: int) -> None:
        """Log what to do where training waited because the queue ran empty."""
        figures = self.figures()
        if figures["reader/wait_share"] > ADVISE_WAIT_SHARE and figures["reader/queue_fill"] < ADVISE_QUEUE_FILL:
            logging.warning(
                "training waited for data %.0f %% of the time: raise --reader_count (now %d) if there are free cores",
                100 * figures["reader/wait_share"], reader_count,
            )  # fmt: skip


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step (0-based): a tenth in the first epoch, as warm-up."""
    warm_up = step < min(args.test_every_n_steps, WARM_UP_STEPS)
    return args.learning_rate * (WARM_UP_FACTOR if warm_up else 1.0)


def evaluate(trainer: "UNetTrainer", reader: "ImageReader", batches: Any) -> dict[str, Any]:
    """Evaluate each test image exactly once; return the mean loss and `unet_model.score_confusion`'s figures."""
    from unet_model import score_confusion

    steps = reader.get_pass_batches() // trainer.num_replicas
    progress = Progress("test step", steps, "", reader.get_image_count() / steps, "images")
    loss_sum, confusion = 0.0, np.zeros((), np.int64)
    for step in range(steps):
        losses, counts = trainer.test_step(take(batches, reader))
        loss_sum += float(losses)
        confusion = confusion + counts.numpy()
        progress.update(step + 1)
    progress.close()
    return {"loss": loss_sum / reader.get_image_count(), "confusion": confusion, **score_confusion(confusion)}


def take(batches: Any, reader: "ImageReader") -> Any:
    """Return the next global batch; where a reader has failed, raise its own error instead of TensorFlow's."""
    import tensorflow as tf

    reader.raise_failure()
    try:
        return next(batches)
    except (tf.errors.OpError, StopIteration):
        reader.raise_failure()
        raise


# ---------------------------------------------------------------------------------------------- reporting


class Report:
    """Writes a row or point for each test epoch: test_loss.csv, metrics.csv, TensorBoard, and the log."""

    def __init__(self, output_dir: Path, number_classes: int) -> None:
        import tensorflow as tf

        self._output_dir = output_dir
        self._writers = {
            name: tf.summary.create_file_writer(os.fspath(output_dir / f"tensorboard-{name}"))
            for name in ("train", "test")
        }
        classes = range(number_classes)
        columns = ["epoch", "step", "learning_rate", "train_loss", "test_loss", "accuracy"]
        columns += [f"iou_{class_id}" for class_id in classes] + [f"dice_{class_id}" for class_id in classes]
        self._append("metrics.csv", columns)
        self._append("test_loss.csv", ["epoch", "test_loss"])

    def write(self, epoch: int, step: int, train: dict[str, float], test: dict[str, Any], is_best: bool) -> None:
        """Write the figures of one epoch; `train` as `train_one_epoch`, `test` as `evaluate` returns them."""
        scores = [*test["iou"], *test["dice"]]
        shown = ["" if math.isnan(score) else f"{score:.6f}" for score in scores]  # an absent class has no score
        head = [epoch, step, f"{train['learning_rate']:g}", f"{train['loss']:.6f}", f"{test['loss']:.6f}"]
        self._append("metrics.csv", [*head, f"{test['accuracy']:.6f}", *shown])
        self._append("test_loss.csv", [epoch, f"{test['loss']:.6f}"])
        self._write_scalars(step, train, test)
        dice = ", ".join("absent" if math.isnan(score) else f"{score:.3f}" for score in test["dice"])
        logging.info(
            "epoch %d step %d: train loss %.4f, test loss %.4f%s, accuracy %.4f, Dice of each class %s; "
            "%.1f images/s, queue %.0f %% full, waited for data %.0f %%",
            epoch, step, train["loss"], test["loss"], " (best)" if is_best else "", test["accuracy"], dice,
            train["images_per_second"], 100 * train["reader/queue_fill"], 100 * train["reader/wait_share"],
        )  # fmt: skip

    def _write_scalars(self, step: int, train: dict[str, float], test: dict[str, Any]) -> None:
        import tensorflow as tf

        with self._writers["train"].as_default(step):
            for name, value in train.items():
                tf.summary.scalar(name, value)
            self._writers["train"].flush()
        with self._writers["test"].as_default(step):
            tf.summary.scalar("loss", test["loss"])
            tf.summary.scalar("accuracy", test["accuracy"])
            for name in ("iou", "dice"):
                for class_id, value in enumerate(test[name]):
                    if not math.isnan(value):
                        tf.summary.scalar(f"{name}/class_{class_id}", value)
            self._writers["test"].flush()

    def _append(self, name: str, row: list[Any]) -> None:
        """Append one row to a CSV file; opened and closed each time, so that a killed job has lost nothing."""
        with open(self._output_dir / name, "a", newline="") as file:
            csv.writer(file).writerow(row)


if __name__ == "__main__":
    sys.exit(main())
