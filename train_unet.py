r"""Train a U-Net on the databases that build_lmdb.py wrote.

    python train_unet.py --train_database data/train-cells.lmdb --test_database data/test-cells.lmdb \
        --output_dir results/cells --number_classes 2

Owns the training loop, checkpoints, early stopping, signals, and the processes on several nodes. A run that stopped
early resumes when it is started again in the same way. TensorFlow is imported inside functions, because the spawned
reader processes import this file again and do not need it, and ``-h`` should answer immediately.
"""

import os
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH excludes it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C while modules load

import argparse
import atexit
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, TypeVar, Union

import numpy as np

from cli import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_STOPPED,
    LOCK_FILE,
    Claims,
    InputError,
    LogFormatter,
    Parser,
    Progress,
    StopRequest,
    add_flag,
    any_text,
    cause_of,
    check_kinds,
    check_values,
    describe_error,
    format_seconds,
    gpus_of_task,
    is_out_of_memory,
    keep_freed_memory,
    log_settings,
    number_type,
    positive_int,
    process_count,
    read_json,
    read_own_file,
    real,
    remove,
    replacing,
    replacing_folder,
    run_script,
    seed_int,
    slurm_number,
    slurm_text,
    some_path,
    tasks_of_nodes,
    whole,
    whole_number,
    without_patterns,
)
from imagereader import ImageReader, ReaderError, check_classes
from lmdb_utils import RADIUS, SIZE_FACTOR, Database, Metadata, check_saved_model

if TYPE_CHECKING:
    from reports import Report
    from unet_model import UNetTrainer

Item = TypeVar("Item")

WARM_UP_FACTOR = 0.1  # of the learning rate, during warm-up
WARM_UP_STEPS, WARM_UP_SHARE = 1000, 0.1  # longest warm-up; share of a run whose last step is known
DECAY_POWER = 0.9  # the learning rate falls with this power of the share of steps left
PLATEAU_FACTOR = 0.1  # of the learning rate, when the test loss stops improving in a run without a known end
EARLY_STOPPING_DELTA = 1e-4  # a test loss must fall by more than this to count as an improvement
REPORTING_STEPS = 3  # after which the log reports the time between test epochs
LONG_EPOCH = 3600.0  # seconds, on a CPU
FEWEST_FEATURES, COST_EXPONENT = 8, 1.5  # a step with 64 features takes about 8**1.5 times as long as with 8
UNDESTROYED: list[Any] = []  # iterators kept until the process exits; `run_job` explains why
CHECKPOINTS_KEPT = 2
OUTPUT_FILES = (  # files that a resumed run opens
    "train.log", "settings.json", "report.html", "*.csv", "*.png", "checkpoint/", "checkpoint/[0-9]*/*",
    "tensorboard-*/", "tensorboard-*/events.*",
)  # fmt: skip
MANY_CLASSES, MANY_FEATURES = 4096, 2**14  # a network with more fits in no computer's memory
ADVISE_WAIT_SHARE, ADVISE_QUEUE_FILL = 0.05, 0.5  # readers are too slow above this wait and below this fill
FIRST_PORT, PORTS = 15000, 10000  # for communication between the processes of a Slurm job
TOO_LITTLE_MEMORY = "the GPU has too little memory: lower --batch_size or build the databases with smaller tiles"
GPU_DEVICE = "/dev/nvidiactl"  # created by the NVIDIA driver if it finds a GPU


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script; return its exit code."""
    return run_script(build_parser, run_job, argv)


def run_job(args: argparse.Namespace, stop: StopRequest) -> NoReturn:
    """Check the input, train, and exit the process; report expected errors with a message and an exit code."""
    pace = Pace()
    metadata = read_metadata(args)
    weights = weights_of_classes(args, metadata[0])
    Checkpoints.compare(args.output_dir, fixed_settings(args, *metadata))
    if args.initial_model is not None and not Checkpoints.find(args.output_dir):  # a resumed run does not read it
        check_saved_model(args.initial_model)
    stop.is_polled = True
    # TensorFlow enables oneDNN operations only on some types of CPU, but they make a step up to three times as fast on
    # other types as well.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.dont_write_bytecode = True  # TensorFlow imports temporary files, whose compiled copies would remain
    cluster = Cluster.find(os.environ)
    with contextlib.ExitStack() as stack:
        if cluster.is_chief:
            stack.enter_context(own_output_dir(args.output_dir, args.resume))
        else:
            logging.getLogger().setLevel(logging.WARNING)  # the chief logs for all
        log_settings(args)
        strategy = make_strategy(cluster, bool(args.deterministic), bool(args.mixed_precision))
        stop.watch()  # again, because a strategy of several processes takes over SIGTERM
        code = EXIT_FAILURE
        try:
            code = train(args, cluster, strategy, stop, pace, metadata, weights)
        except TrainingError as error:
            logging.error("%s", error)
        except ReaderError:  # logged in full when it happened
            logging.error("training stopped because a reader failed (see above); everything saved before is kept")
        except (InputError, OSError, MemoryError) as error:
            logging.error("%s", describe_error(error))
            code = EXIT_BAD_INPUT
    # All files are written, and the readers have exited. A normal exit could wait for up to a minute: before TensorFlow
    # destroys an iterator, it joins the thread that tunes it, which sleeps for longer and longer. Processes that train
    # together also wait for each other. So this process exits like a forked process of multiprocessing: functions
    # registered with atexit run (TensorFlow removes its temporary files), but no object is destroyed.
    atexit._run_exitfuncs()
    os._exit(code)


class Run(NamedTuple):
    """The parts of a run; `state` changes as the run proceeds."""

    args: argparse.Namespace
    cluster: "Cluster"
    trainer: "UNetTrainer"
    stop: StopRequest
    checkpoints: "Checkpoints"
    state: "RunState"
    pace: "Pace"
    first_step: int  # first step of this process, not 0 in a resumed run

    @property
    def global_batch(self) -> int:
        """Images that all replicas take in a step."""
        return int(self.args.batch_size * self.trainer.num_replicas)


def train(
    args: argparse.Namespace,
    cluster: "Cluster",
    strategy: Any,
    stop: StopRequest,
    pace: "Pace",
    metadata: tuple[Metadata, Metadata],
    weights: Optional[list[float]],
) -> int:
    """Train until the test loss stops improving, a limit is reached or a signal arrives; return the exit code."""
    trainer, portable = build_networks(args, strategy, metadata[0].image_shape[2], weights)
    checkpoints = Checkpoints(args.output_dir, trainer, fixed_settings(args, *metadata), cluster)
    state = checkpoints.restore() or begin_state(args, trainer)
    state.stopping.patience = args.early_stopping
    if args.initial_model is not None and not state.initial_model:
        raise InputError(
            f"the run in {args.output_dir} was started without --initial_model; omit it to resume, or choose another "
            "--output_dir"
        )
    run = Run(args, cluster, trainer, stop, checkpoints, state, pace, state.step)
    report = begin_report(run, metadata) if cluster.is_chief else None
    with training_errors(cluster), contextlib.ExitStack() as stack:
        train_batches, test_batches = (stack.enter_context(supply) for supply in supplies(run, metadata[0]))
        pace.begin(state.seconds, test_batches.reader.get_pass_steps())
        keep_freed_memory()  # not earlier: TensorFlow undoes it when it opens a generator
        while not reason_to_end(run):
            train_figures = train_one_epoch(run, train_batches)
            pace.begin_test()
            test_figures = train_figures and evaluate(run, test_batches)
            if not train_figures or not test_figures:
                return save_and_stop(run)
            is_best = state.finish_epoch(test_figures["loss"])
            if report is not None:
                portable.set_weights(trainer.averaged.get_weights())
                with saving(f"the results of epoch {state.epoch} in {args.output_dir}"):
                    report.write(state, train_figures, test_figures, portable)
                    if is_best:
                        export(run, portable, metadata[0])
                        report.write_page(state, test_figures)
            save_checkpoint(run)
            pace.finish_test()
    if report is not None:
        report.conclude(reason_to_end(run), state)
    return 0


def begin_state(args: argparse.Namespace, trainer: "UNetTrainer") -> "RunState":
    """Return the state of a new run, after loading the weights of --initial_model if given."""
    state = RunState(EarlyStopping(args.early_stopping))
    if args.initial_model is not None:
        state.initial_model = trainer.start_from(args.initial_model)
    return state


def train_one_epoch(run: Run, batches: "BatchSupply") -> Optional[dict[str, float]]:
    """Train until the next test epoch; return loss, learning rate and speed, or None if a signal arrived first."""
    args, state = run.args, run.state
    label, length = f"epoch {state.epoch + 1} step", state.epoch_step + steps_to_test(args, state)
    progress = Progress(label, length, "", run.global_batch, "images", first=state.epoch_step)
    batches.begin_measuring()
    votes, first, start = Votes(), state.epoch_step, time.monotonic()
    learning_rate = learning_rate_at(state.step - 1, args, state)
    while steps_to_test(args, state) and not votes.stop:
        steps, votes = queue_steps(run, batches), Votes()
        for figures in one_late(steps):
            loss, pixels, *cast = figures.numpy().tolist()
            if not math.isfinite(loss):
                raise TrainingError(describe_loss(run, loss, batches.reader))
            state.count_step(loss, pixels, run.global_batch)
            run.pace.note_step()
            if run.pace.typical_steps >= REPORTING_STEPS and not run.pace.is_reported:
                report_pace(run)
            progress.update(state.epoch_step, f"loss {loss:.4f}, {batches},")
            votes = Votes(*map(max, zip(votes, cast)))
            if any(votes):
                steps.close()  # after the step that is already queued, whose loss comes next
        learning_rate = learning_rate_at(state.step - 1, args, state)  # before the plan changes
        heed(run, votes)
        progress.total = state.epoch_step + steps_to_test(args, state)
    progress.close()
    batches.advise(args.reader_count)
    if votes.stop:
        return None
    figures = {"loss": state.mean_loss, "learning_rate": learning_rate}
    if state.epoch_step > first:  # false if the run was stopped during its test epoch
        rate = (state.epoch_step - first) * run.global_batch / (time.monotonic() - start)
        figures.update(images_per_second=rate, **batches.figures())
    return figures


def evaluate(run: Run, batches: "BatchSupply") -> Optional[dict[str, Any]]:
    """Evaluate each test image once; return mean loss, confusion matrix and scores, or None if a signal arrived."""
    from reports import score_confusion

    count, steps = batches.reader.get_image_count(), batches.reader.get_pass_steps()
    progress = Progress("test step", steps, "", count / steps, "images")
    sums, confusion = np.zeros(()), np.zeros((), np.int64)
    queued = (run.trainer.test_step(batches.next_batch(), (bool(run.stop),)) for _ in range(steps))
    for step, (stop_votes, of_batch, counts) in enumerate(one_late(queued), 1):
        if stop_votes.numpy().any():
            return None
        sums = sums + of_batch.numpy()  # in float64
        confusion = confusion + counts.numpy()
        progress.update(step)
    progress.close()
    test_loss = float(run.trainer.test_loss.value(sums))
    if not math.isfinite(test_loss):
        raise TrainingError(
            f"the test loss became {test_loss} in epoch {run.state.epoch + 1}; the last checkpoint and the best "
            "model so far are kept. Lower --learning_rate and look for broken test images"
        )
    return {"loss": test_loss, "confusion": confusion, **score_confusion(confusion)}


def queue_steps(run: Run, batches: "BatchSupply") -> Generator[Any, None, None]:
    """Queue the remaining steps of the epoch; yield the loss and votes of each, which may not be computed yet."""
    first = run.state.step
    for step in range(first, first + steps_to_test(run.args, run.state)):
        run.trainer.set_learning_rate(learning_rate_at(step, run.args, run.state))
        yield run.trainer.train_step(batches.next_batch(), cast_votes(run))


def one_late(queued: Iterable[Item]) -> Iterator[Item]:
    """Yield each item after requesting the next, so that a device has a step to run while the last one is read."""
    last: list[Item] = []
    for item in queued:
        yield from last
        last = [item]
    yield from last


# ---------------------------------------------------------------------------------------------- parts of a run


def build_networks(
    args: argparse.Namespace, strategy: Any, channels: int, weights: Optional[list[float]]
) -> tuple["UNetTrainer", Any]:
    """Return the network in training, and a float32 copy on one device for exports and pictures."""
    import tensorflow as tf

    from unet_model import Loss, UNetTrainer, build_unet

    tf.keras.utils.set_random_seed(args.seed)
    network = channels, args.number_classes, args.baseline_feature_depth
    precision = "mixed_float16" if args.mixed_precision else "float32"
    trainer = UNetTrainer(
        strategy,
        lambda dropout_key: build_unet(
            *network,
            args.dropout,
            dropout_key=dropout_key,
            precision=precision,
            deep_supervision=bool(args.deep_supervision),
        ),
        args.learning_rate,
        Loss(
            args.number_classes,
            args.loss == "cross_entropy_dice",
            args.label_smoothing,
            None if weights is None else tuple(weights),
        ),
        args.seed,
        bool(args.average_weights),
        bool(args.mixed_precision),
        uses_xla(args, strategy),
    )
    return trainer, build_unet(*network)


def uses_xla(args: argparse.Namespace, strategy: Any) -> Optional[bool]:
    """Return whether to compile the training step; None to try it.

    Raises
    ------
    InputError
        If --xla 1 is set for several replicas, which have to exchange sums in the middle of a step.
    """
    import tensorflow as tf

    one = strategy.num_replicas_in_sync == 1
    if args.xla == "1" and not one:
        raise InputError(
            f"expected a single GPU for --xla 1, found {strategy.num_replicas_in_sync}; omit the option, or set "
            "CUDA_VISIBLE_DEVICES to one GPU"
        )
    if args.xla == "auto" and one and not args.deterministic and tf.config.list_logical_devices("GPU"):
        return None
    return args.xla == "1"


def begin_report(run: Run, metadata: tuple[Metadata, Metadata]) -> "Report":
    """Write the settings, log the size of the network and of the global batch, and start the result files."""
    from reports import Report

    args, state = run.args, run.state
    with saving(f"results in {args.output_dir}"):
        write_settings(run, *metadata)
        report = Report(
            args.output_dir, args.test_database, metadata[0].deviation_floor, args.number_classes, state.epoch,
            state.step,
        )  # fmt: skip
    weights = f"{run.trainer.model.count_params():,}"
    logging.info("network of %s weights, global batch of %d images", weights, run.global_batch)
    if state.step:
        logging.info("resuming at step %d, after %d test epochs", state.step, state.epoch)
    return report


def describe_loss(run: Run, loss: float, reader: ImageReader) -> str:
    """Return a message about a loss that is not finite."""
    step, rate = run.state.step, learning_rate_at(run.state.step, run.args, run.state)
    records = ", ".join(reader.describe_step(step - run.first_step))
    return (
        f"the loss became {loss} at step {step + 1} (learning rate {rate:g}); the last checkpoint is kept. Lower "
        f"--learning_rate and look for broken images. The batch contained {records}"
    )


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint, including the duration of the run so far."""
    run.state.seconds = run.pace.elapsed()
    run.checkpoints.save(run.state)


def save_and_stop(run: Run) -> int:
    """Write a checkpoint because a signal arrived; return the exit code."""
    save_checkpoint(run)
    name = run.stop.signal.name if run.stop.signal else "a signal to another process"
    logging.info("stopped by %s at step %d, checkpoint saved; start again to resume", name, run.state.step)
    if run.state.best_epoch:
        logging.info("the best model so far is in %s", run.args.output_dir / "saved_model")
    return EXIT_STOPPED


def export(run: Run, model: Any, train_data: Metadata) -> None:
    """Write the SavedModel with the metadata that inference needs."""
    from unet_model import export_saved_model

    metadata = {
        "number_classes": run.args.number_classes,
        "channels": train_data.image_shape[2],
        "source_channels": train_data.info.get("channels"),
        "channel_suffixes": train_data.info.get("channel_suffixes"),
        "label_map": train_data.info.get("label_map"),
        "objects": train_data.info.get("objects"),
        "image_no_data": train_data.info.get("image_no_data"),
        "radius": RADIUS,
        "size_factor": SIZE_FACTOR,
        "normalization": "(pixel - mean) / deviation of each channel of an image, the deviation at least its floor",
        "deviation_floor": train_data.info["deviation_floor"],
        "value_range": train_data.info.get("value_range"),
        "image_dtype": train_data.info["image_dtype"],
        "baseline_feature_depth": run.args.baseline_feature_depth,
    }
    export_saved_model(model, run.args.output_dir / "saved_model", metadata)


@contextlib.contextmanager
def training_errors(cluster: "Cluster") -> Iterator[None]:
    """Turn TensorFlow errors caused by the computer or by other processes into a `TrainingError`."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        if is_out_of_memory(error):
            raise TrainingError(TOO_LITTLE_MEMORY) from error
        if cluster.world_size == 1:
            raise
        found = re.search(r"aborted by: (.*)", error.message)
        reason = found[1] if found else error.message.splitlines()[0]
        raise TrainingError(
            f"another process of this job failed or disappeared; start again to resume (TensorFlow: {reason})"
        ) from error


# ---------------------------------------------------------------------------------------------- schedule and budget


def reason_to_end(run: Run) -> str:
    """Return why the run is done, or an empty string."""
    args, state = run.args, run.state
    if state.stopping.should_stop:
        return f"the test loss has not improved for {args.early_stopping} epochs"
    if args.max_epochs is not None and state.epoch >= args.max_epochs:
        return "last epoch reached"
    end = planned_steps(args, state)
    if end is not None and state.step >= end and state.epoch_step == 0:
        return f"{args.max_minutes:g} minutes are used up"
    return ""


def planned_steps(args: argparse.Namespace, state: "RunState") -> Optional[int]:
    """Return the step at which the run's minutes will be used up; None if there is no limit or no plan yet."""
    return state.planned_steps if args.max_minutes and state.planned_minutes == args.max_minutes else None


def last_step(args: argparse.Namespace, state: "RunState") -> Optional[int]:
    """Return the last step of the run, by `max_epochs` or `max_minutes`, whichever comes first; None if unknown."""
    ends = [planned_steps(args, state)]
    if args.max_epochs is not None:
        epochs_left = args.max_epochs - state.epoch
        ends.append(state.step - state.epoch_step + epochs_left * args.test_every_n_steps)
    return min((end for end in ends if end is not None), default=None)


def steps_to_test(args: argparse.Namespace, state: "RunState") -> int:
    """Return the number of steps until the next test epoch."""
    left: int = args.test_every_n_steps - state.epoch_step
    end = last_step(args, state)
    return max(left if end is None else min(left, end - state.step), 0)


def learning_rate_at(step: int, args: argparse.Namespace, state: "RunState") -> float:
    """Return the learning rate after `step` steps.

    Warm-up takes a tenth of `learning_rate` in the first epoch, for at most 1000 steps and a tenth of the run. After
    that, the rate falls to 0 at the end of the run. If no end is known, it falls to a tenth each time the test loss
    stops improving.
    """
    rate: float = args.learning_rate
    end, warm_up = last_step(args, state), min(args.test_every_n_steps, WARM_UP_STEPS)
    if end is not None:
        warm_up = min(warm_up, int(WARM_UP_SHARE * end))
    if step < warm_up:
        return rate * WARM_UP_FACTOR
    if args.schedule == "constant":
        return rate
    if end is None:
        return rate * PLATEAU_FACTOR**state.plateaus
    return rate * float(max(end - step, 0) / max(end - warm_up, 1)) ** DECAY_POWER


class Votes(NamedTuple):
    """Requests that processes exchange with a step; all of them get the sums over all replicas at the same step."""

    stop: float = 0.0  # because of a signal
    save: float = 0.0  # a checkpoint
    end: float = 0.0  # because the minutes are used up
    planned_steps: float = 0.0  # total of the run; the votes of one process's replicas add up to it


def cast_votes(run: Run) -> Votes:
    """Return the votes of this process; only the chief checks the clock."""
    args, state, pace = run.args, run.state, run.pace
    votes = Votes(bool(run.stop))
    if not run.cluster.is_chief:
        return votes
    votes = votes._replace(save=run.checkpoints.are_due(args.checkpoint_minutes))
    if args.max_minutes is None:
        return votes
    left = 60 * args.max_minutes - pace.elapsed()
    is_first = planned_steps(args, state) is None
    if pace.is_known and (is_first or pace.may_revise and state.epoch == 1):
        total = pace.last_step_within(left, state.step, args.test_every_n_steps)
        return votes._replace(planned_steps=total / (run.trainer.num_replicas // run.cluster.world_size))
    return votes._replace(end=left < pace.closing_seconds + 2 * pace.step_seconds)


def heed(run: Run, votes: Votes) -> None:
    """Carry out the votes of all processes."""
    args, state = run.args, run.state
    if votes.planned_steps and not votes.stop:
        state.planned_steps, state.planned_minutes = round(votes.planned_steps), args.max_minutes
        run.pace.may_revise = False
        logging.info("%g minutes are enough for about %d steps", args.max_minutes, state.planned_steps)
    if votes.end:
        state.planned_steps, state.planned_minutes = state.step, args.max_minutes
    if votes.save and not votes.stop:
        save_checkpoint(run)


def report_pace(run: Run) -> None:
    """Log the time between test epochs; if it is very long on a CPU, also suggest fewer features."""
    import tensorflow as tf

    args, pace = run.args, run.pace
    pace.is_reported = True
    seconds = args.test_every_n_steps * pace.step_seconds + pace.closing_seconds
    steps = f"{args.test_every_n_steps} steps and their test epoch"
    if seconds <= LONG_EPOCH or tf.config.list_logical_devices("GPU"):
        logging.info("%s take about %s", steps, format_seconds(seconds))
        return
    features, shorter = args.baseline_feature_depth, seconds
    while features > FEWEST_FEATURES and shorter > LONG_EPOCH:
        features, shorter = features // 2, shorter / 2**COST_EXPONENT
    logging.warning(
        "%s will take about %s on this CPU; with --baseline_feature_depth %d it would be about %s, and a smaller "
        "--test_every_n_steps gives figures sooner", steps, format_seconds(seconds), features, format_seconds(shorter),
    )  # fmt: skip


class Pace:
    """Durations of steps and test epochs in this process, and of the run in all its processes so far."""

    UNTYPICAL, KNOWN = 2, 20  # slower steps at the start; steps after which the pace is known
    RECENT = 100  # steps; their median is the time of a step
    TEST_STEP_SHARE = 0.3  # of the time of a training step, which also has a backward pass
    WRITING_SECONDS = 5.0  # for pictures, model and checkpoint

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._durations: collections.deque[float] = collections.deque([], self.RECENT)
        self._noted = 0  # number of durations
        self._last = self._test_begun = math.nan
        self._tested = 0.0
        self.test_steps = 0
        self.is_reported = False
        self.may_revise = False  # the first plan, once: the pace is known better after a test epoch

    def begin(self, seconds: float, test_steps: int) -> None:
        """Record the earlier duration of the run, and the number of steps in a test epoch."""
        self._begun -= seconds
        self.test_steps = test_steps

    def elapsed(self) -> float:
        """Return the duration of the run so far, in seconds."""
        return time.monotonic() - self._begun

    def note_step(self) -> None:
        """Record the end of a step."""
        now = time.monotonic()
        if not math.isnan(now - self._last):
            self._noted += 1
            if self._noted <= self.UNTYPICAL + 1:
                self._durations.clear()
            self._durations.append(now - self._last)
        self._last = now

    def begin_test(self) -> None:
        """Record the start of a test epoch."""
        self._test_begun, self._last = time.monotonic(), math.nan

    def finish_test(self) -> None:
        """Record the end of a test epoch, after its results are written."""
        self.may_revise = not self._tested
        self._tested = max(self._tested, time.monotonic() - self._test_begun)

    @property
    def typical_steps(self) -> int:
        """Number of steps that `step_seconds` is based on."""
        return len(self._durations) if self._noted > self.UNTYPICAL else 0

    @property
    def is_known(self) -> bool:
        """Whether there have been enough steps to plan with."""
        return self.typical_steps >= self.KNOWN

    @property
    def step_seconds(self) -> float:
        """Median duration of recent steps, in seconds; 0 before the first step."""
        return statistics.median(self._durations or [0.0])

    @property
    def closing_seconds(self) -> float:
        """Seconds of the slowest test epoch, including writing its results; an estimate before the first one."""
        return self._tested or self.TEST_STEP_SHARE * self.test_steps * self.step_seconds + self.WRITING_SECONDS

    def last_step_within(self, seconds: float, step: int, steps_per_test: int) -> int:
        """Return the last step that a run at `step` can reach in `seconds`, its test epochs included.

        Steps after the last full epoch are dropped if they take less time than a test epoch.
        """
        seconds -= self.closing_seconds  # for the last test epoch
        of_tests = self.closing_seconds / steps_per_test if seconds > steps_per_test * self.step_seconds else 0.0
        last = step + max(int(seconds / (self.step_seconds + of_tests)), 0)
        rest = last % steps_per_test
        return last - rest if step <= last - rest and rest * self.step_seconds < self.closing_seconds else last


# ---------------------------------------------------------------------------------------------- batches


def supplies(run: Run, train_data: Metadata) -> Iterator[Any]:
    """Yield context managers of the training batches, from the current position of the run, and of the test batches."""
    args, replicas = run.args, run.trainer.num_replicas // run.cluster.world_size
    common = {
        "number_classes": args.number_classes,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "replicas": replicas,
        "deviation_floor": train_data.deviation_floor,
        **run.cluster._asdict(),
    }
    train_reader = ImageReader(
        args.train_database,
        name="train reader",
        num_workers=args.reader_count * replicas,
        use_augmentation=bool(args.use_augmentation),
        balance_classes=bool(args.balance_classes),
        shuffle=True,
        first_sample=run.state.samples,
        **common,
    )
    test_reader = ImageReader(
        args.test_database,
        name="test reader",
        num_workers=args.test_reader_count * replicas,
        shuffle=False,
        **common,
    )
    return (open_supply(run.trainer, reader) for reader in (train_reader, test_reader))


@contextlib.contextmanager
def open_supply(trainer: "UNetTrainer", reader: ImageReader) -> Iterator["BatchSupply"]:
    """Start a reader and yield its global batches; stop the reader and exhaust the iterator at the end.

    TensorFlow destroys an iterator in the thread that drops it, which holds Python's global lock and waits for the
    prefetching threads. If one of these is about to call the generator, it waits for the same lock, and neither
    continues. A generator that has ended is not called again.
    """
    with reader:
        batches = trainer.distribute(reader)
        UNDESTROYED.append(batches)
        try:
            yield BatchSupply(batches, reader)
        finally:
            reader.shutdown()
            with contextlib.suppress(Exception):  # a failed reader ends the stream with an error, already reported
                for _ in batches:
                    pass


class BatchSupply:
    """The global batches that `UNetTrainer.distribute` makes from a reader, and how well the reader keeps up."""

    def __init__(self, batches: Any, reader: ImageReader) -> None:
        self._batches, self.reader = batches, reader
        self.begin_measuring()

    def begin_measuring(self) -> None:
        """Reset the figures, and measure from now on."""
        self._start = time.monotonic()
        self._waited = self._fill = 0.0
        self._taken = 0

    def next_batch(self) -> Any:
        """Return the next global batch; if a reader has failed, raise its own error instead of TensorFlow's."""
        import tensorflow as tf

        self._fill += self.reader.get_queue_size() / self.reader.get_queue_capacity()
        self._taken += 1
        asked = time.monotonic()
        self.reader.raise_failure()
        try:
            batch = next(self._batches)
        except (tf.errors.OpError, StopIteration):
            self.reader.raise_failure()
            raise
        self._waited += time.monotonic() - asked
        return batch

    def figures(self) -> dict[str, float]:
        """Return mean fill of the queue (0 to 1), mean wait for a batch, and share of the time spent waiting."""
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
        """Log advice if training waited because the queue ran empty."""
        figures = self.figures()
        if figures["reader/wait_share"] > ADVISE_WAIT_SHARE and figures["reader/queue_fill"] < ADVISE_QUEUE_FILL:
            logging.warning(
                "training waited for data %.0f %% of the time: raise --reader_count (now %d) if there are free cores",
                100 * figures["reader/wait_share"], reader_count,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser("train_unet", "Script which trains a unet model")
    add_data_options(parser.add_argument_group("data"))
    add_training_options(parser.add_argument_group("training"))
    group = parser.add_argument_group("network, loss and schedule")
    add_network_options(group)
    add_loss_options(group)
    add_run_options(parser.add_argument_group("run"))
    return parser


def add_data_options(group: Any) -> None:
    """Add the required options: where the data is and where results go."""
    required = {"required": True, "default": argparse.SUPPRESS}
    for side in ("train", "test"):
        metavar = f"{side.upper()}_DATABASE_FILEPATH"
        text = f"lmdb database to use for {side}ing, from build_lmdb.py (Required)"
        group.add_argument(f"--{side}_database", metavar=metavar, type=some_path, **required, help=text)
    text = "Folder where outputs will be saved; give the folder of an earlier run to resume it (Required)"
    group.add_argument("--output_dir", metavar="OUTPUT_FOLDER", type=some_path, **required, help=text)


def add_training_options(group: Any) -> None:
    """Add the other options that the specification lists."""
    group.add_argument("--batch_size", type=whole_number(1, 2**16), default=4, help="images per batch on each GPU")
    text = "number of classes being segmented, background (0) included"
    group.add_argument("--number_classes", type=whole_number(1, MANY_CLASSES), default=2, help=text)
    text = (
        "learning rate of the Adam optimizer; one tenth of it during warm-up (the first epoch, but no more than 1000 "
        "steps or a tenth of the run), then see --schedule"
    )
    group.add_argument("--learning_rate", type=rate_float, default=3e-4, help=text)
    text = (
        "number of gradient update steps between test epochs; an epoch is this many steps, whatever the data set size"
    )
    group.add_argument("--test_every_n_steps", type=positive_int, default=1000, help=text)
    text = (
        "whether to balance classes: for each training image, first draw a class, all equally likely, then an image "
        "that contains it [0 = false, 1 = true]"
    )
    add_flag(group, "--balance_classes", 0, text)
    text = "whether to use data augmentation, which transforms each training image at random [0 = false, 1 = true]"
    add_flag(group, "--use_augmentation", 1, text)
    text = "Perform early stopping when the test loss does not improve (by more than 1e-4) for N test epochs"
    group.add_argument("--early_stopping", metavar="EARLY_STOPPING_COUNT", type=positive_int, default=10, help=text)
    text = "number of processes per GPU for disk I/O and augmentation"
    group.add_argument("--reader_count", type=process_count, default=1, help=text)


def add_network_options(group: Any) -> None:
    """Add options beyond the specification: the network, and how long to train it."""
    text = (
        "number of features at the network's top level, doubled at each of the four levels below; 8 or 16 suit a laptop"
    )
    group.add_argument("--baseline_feature_depth", type=whole_number(1, MANY_FEATURES), default=64, help=text)
    text = (
        "network to start from: the saved_model folder of another training run with the same --baseline_feature_depth; "
        "the first layer is new if the channels differ, and the last layer if the classes differ"
    )
    group.add_argument("--initial_model", metavar="SAVED_MODEL_FILEPATH", type=some_path, default=None, help=text)
    text = "stop after this many test epochs; the learning rate falls to 0 by then"
    group.add_argument("--max_epochs", type=positive_int, default=None, help=text)
    text = (
        "stop after this many minutes, including the time before the run was resumed, the last test epoch and the "
        "export; the learning rate falls to 0 by then"
    )
    group.add_argument("--max_minutes", type=minutes_float, default=None, help=text)
    text = (
        "schedule of the learning rate after warm-up: 'falling' lowers it to 0 at the end set by --max_epochs or "
        "--max_minutes or, if no end is set, divides it by ten each time the test loss has not improved for half of "
        "--early_stopping; 'constant' keeps it unchanged"
    )
    group.add_argument("--schedule", choices=("falling", "constant"), default="falling", help=text)


def add_loss_options(group: Any) -> None:
    """Add options beyond the specification: the loss, dropout, and the average of the weights."""
    text = (
        "loss that training minimizes and that selects the best model; cross_entropy_dice adds the Dice loss, in which "
        "small classes matter as much as large ones"
    )
    group.add_argument(
        "--loss", choices=("cross_entropy_dice", "cross_entropy"), default="cross_entropy_dice", help=text
    )
    text = (
        "whether to train the coarser levels of the decoder on the mask as well, so that networks learn in fewer "
        "steps; the exported model is no larger [0 = false, 1 = true]"
    )
    add_flag(group, "--deep_supervision", 1, text)
    text = "fraction of the features of the two deepest levels to drop in each training step, 0 to below 1"
    group.add_argument("--dropout", type=share_float, default=0.0, help=text)
    text = (
        "whether to test and export a moving average of the weights over about the last tenth of all steps, instead of "
        "the weights of the last step [0 = false, 1 = true]"
    )
    add_flag(group, "--average_weights", 1, text)
    text = "factor of each class in the loss, such as 1,5,5; 'auto' gives all classes the same total weight"
    group.add_argument("--class_weights", type=class_weights, help=text)
    text = "fraction of the target, 0 to below 1, to spread evenly over all classes while training"
    group.add_argument("--label_smoothing", type=share_float, default=0.0, help=text)


def add_run_options(group: Any) -> None:
    """Add options beyond the specification: how to compute, and to resume."""
    text = "seed for image order, augmentation, dropout and initial network weights"
    group.add_argument("--seed", type=seed_int, default=0, help=text)
    text = "'auto' resumes the run in --output_dir, if there is one; with 'never', the folder must be empty"
    group.add_argument("--resume", choices=("auto", "never"), default="auto", help=text)
    text = "number of processes per GPU for test images, which are not augmented and so take little time"
    group.add_argument("--test_reader_count", type=process_count, default=1, help=text)
    text = "minutes between checkpoints, in addition to one after each test epoch"
    group.add_argument("--checkpoint_minutes", type=minutes_float, default=10.0, help=text)
    text = (
        "whether to compute in float16 with float32 weights and a scaled loss, for GPUs on which this is faster (V100 "
        "and later); the exported model is float32 [0 = false, 1 = true]"
    )
    add_flag(group, "--mixed_precision", 0, text)
    text = "whether to make a run reproducible bit for bit on the same machine, at lower speed [0 = false, 1 = true]"
    add_flag(group, "--deterministic", 0, text)
    text = (
        "whether to compile the training step with XLA, which starts more slowly but then runs faster [0 = false, "
        "1 = true]; 'auto' compiles on a single GPU if XLA works there and --deterministic is 0; CPUs are "
        "faster without XLA"
    )
    group.add_argument("--xla", choices=("auto", "0", "1"), default="auto", help=text)


rate_float = number_type(float, lambda value: 1e-10 <= value <= 10, "a number from 1e-10 to 10, such as 3e-4")
minutes_float = number_type(float, lambda value: 0 < value <= 1e7, "a number above 0 and at most 10 million")
weight_float = number_type(float, lambda value: 1e-6 <= value <= 1e6, "numbers from 1e-6 to 1e6, such as 1,5,5")
share_float = number_type(float, lambda value: 0 <= value < 1, "a number from 0 to below 1, such as 0.1")


def class_weights(text: str) -> Union[str, list[float]]:
    """Return ``"auto"``, or a list of positive numbers; the ``type`` of a command-line option."""
    return text if text == "auto" else [weight_float(part) for part in text.split(",")]


# ---------------------------------------------------------------------------------------------- preparation


def read_metadata(args: argparse.Namespace) -> tuple[Metadata, Metadata]:
    """Return the metadata of both databases, which must contain images of the same kind."""
    found = []
    for filepath in (args.train_database, args.test_database):
        Database.probe(filepath)
        with Database(filepath) as database:
            found.append(database.metadata)
        check_classes(found[-1], args.number_classes, filepath)
    train, test = found
    for option in ("label_map", "objects", "image_no_data", "channels", "channel_suffixes"):
        one, other = train.info.get(option), test.info.get(option)
        if one != other:
            raise InputError(
                f"expected databases with the same --{option}, found {one} in {args.train_database} and {other} in "
                f"{args.test_database}; build them together with build_lmdb.py"
            )
    if train.image_shape != test.image_shape:
        raise InputError(
            f"expected images of the same size in both databases, found {train.image_shape} in {args.train_database} "
            f"and {test.image_shape} in {args.test_database}; build them together with build_lmdb.py"
        )
    compare_sides(args, train, test)
    height, width, _ = train.image_shape
    if height % SIZE_FACTOR or width % SIZE_FACTOR:
        raise InputError(
            f"expected image sizes that are multiples of {SIZE_FACTOR}, found {height} x {width}; rebuild the databases"
        )
    return train, test


def compare_sides(args: argparse.Namespace, train: Metadata, test: Metadata) -> None:
    """Refuse to test on the training data, and warn if the test loss may be too optimistic."""
    if fingerprint(train) == fingerprint(test):
        raise InputError(
            f"{args.train_database} and {args.test_database} contain the same images; pass the train and the test "
            "database that build_lmdb.py wrote"
        )
    if (train.info.get("side"), test.info.get("side")) == ("test", "train"):
        logging.warning("--train_database is the test side of a dataset, --test_database the train side; swapped?")
    shared = set(train.names) & set(test.names)
    if shared:
        logging.warning(
            "%d image names are in both databases, such as %s: if the images are the same, the test loss is too "
            "optimistic; use the train and test database of one build", len(shared), min(shared),
        )  # fmt: skip


def weights_of_classes(args: argparse.Namespace, train: Metadata) -> Optional[list[float]]:
    """Return the factor of each class in the loss; warn about classes that no training image contains."""
    counts = dict(zip(train.classes.tolist(), train.pixel_counts.tolist()))
    absent = [class_id for class_id in range(args.number_classes) if class_id not in counts]
    if absent:
        shown = ", ".join(map(str, absent))
        logging.warning("no training image contains class %s: balancing skips it, and it cannot be learned", shown)
    if args.class_weights == "auto":
        each = sum(counts.values()) / len(counts)
        return [each / counts[class_id] if class_id in counts else 1.0 for class_id in range(args.number_classes)]
    if args.class_weights is not None and len(args.class_weights) != args.number_classes:
        raise InputError(
            f"expected {args.number_classes} --class_weights, one for each class, got {len(args.class_weights)}"
        )
    weights: Optional[list[float]] = args.class_weights
    return weights


@contextlib.contextmanager
def own_output_dir(folder: Path, resume: str) -> Iterator[None]:
    """Create the output folder and reserve it for this run; refuse one that is in use or cannot be resumed from.

    Also opens the log file in it.
    """
    if resume == "never" and folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK_FILE}:
        raise InputError(f"expected an empty --output_dir with --resume never, found files in {folder}; choose another")
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise InputError(f"expected an --output_dir in UTF-8, got {folder}; TensorFlow accepts no other") from None
    checkpoints = folder / Checkpoints.FOLDER
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(Claims(folder, [Checkpoints.FOLDER])).claim("training"):
                raise InputError(
                    f"another training is writing to {folder}; wait until it has exited, or choose another --output_dir"
                )
            check_kinds(folder, OUTPUT_FILES)
            if checkpoints.exists():
                os.listdir(checkpoints)  # raises an error if it may not be read
            # The first row is written before the first checkpoint. A resumed run drops all rows after its checkpoint.
            if not Checkpoints.find(folder) and rows_of_results(folder) > int(checkpoints.exists()):
                raise InputError(
                    f"{folder} contains results but no checkpoint to resume from; choose another --output_dir"
                )
            checkpoints.mkdir(exist_ok=True)
            log_file = logging.FileHandler(folder / "train.log", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write to --output_dir {folder}: {cause_of(error)}") from error
        log_file.setFormatter(LogFormatter())
        logging.getLogger().addHandler(log_file)
        yield


def rows_of_results(folder: Path) -> int:
    """Return the number of epochs that have a row in metrics.csv."""
    metrics = folder / "metrics.csv"
    return len(read_own_file(metrics).splitlines()[1:]) if metrics.exists() else 0


def make_strategy(cluster: "Cluster", deterministic: bool = False, mixed_precision: bool = False) -> Any:
    """Return a strategy over the GPUs of all processes, or over the CPU if there is none, and log which.

    Raises
    ------
    InputError
        If a GPU cannot compute, or several tasks of a node would have to share a GPU.
    """
    import tensorflow as tf

    if deterministic:
        tf.config.experimental.enable_op_determinism()
    visible = tf.config.list_physical_devices("GPU")
    gpus = [visible[index] for index in gpus_of_task(len(visible), os.environ, may_share=False)]
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        logging.info("training on %d GPU%s: %s", len(gpus), "s" * (len(gpus) > 1), ", ".join(gpu.name for gpu in gpus))
    else:
        report_no_gpu(tf.__version__, tf.test.is_built_with_cuda())
    if cluster.world_size > 1:
        logging.info("process %d of %d, waiting for the others", cluster.rank + 1, cluster.world_size)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    check_gpus(gpus, "float16" if mixed_precision else "float32")  # only now: several processes have to connect first
    return strategy


def check_gpus(gpus: Sequence[Any], precision: str) -> None:
    """Run a small convolution on each GPU before anything else starts.

    Raises
    ------
    InputError
        If a GPU fails: it is too new or too old for this TensorFlow, its memory is in use, or a library is missing.
    """
    import tensorflow as tf

    for gpu, device in zip(gpus, tf.config.list_logical_devices("GPU")):
        try:
            with tf.device(device.name):
                tf.nn.conv2d(tf.ones((1, 16, 16, 8), precision), tf.ones((3, 3, 8, 8), precision), 1, "SAME").numpy()
        except tf.errors.OpError as error:
            raise InputError(describe_gpu_failure(gpu, precision, error)) from error


def describe_gpu_failure(gpu: Any, precision: str, error: Any) -> str:
    """Return a message about a GPU that cannot compute, with advice."""
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(gpu)
    capability = ".".join(map(str, details.get("compute_capability", ["unknown"])))
    cuda = tf.sysconfig.get_build_info().get("cuda_version", "unknown")
    advice = (
        "update its driver, or install a TensorFlow that supports it: python -m pip install --upgrade "
        "'tensorflow[and-cuda]'"
    )
    if is_out_of_memory(error):
        advice = "stop the programs that use its memory, which nvidia-smi lists, or choose another GPU"
    return (
        f"expected {gpu.name} ({details.get('device_name', 'unknown')}, compute capability {capability}) to compute in "
        f"{precision} with TensorFlow {tf.__version__} for CUDA {cuda}, found that a convolution fails "
        f"({error.message.splitlines()[0]}); {advice}"
    )


def report_no_gpu(version: str, with_cuda: bool) -> None:
    """Log that training uses the CPU; if a GPU seems to have been intended, warn with a solution."""
    logging.info("training on the CPU: TensorFlow %s sees no GPU", version)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (os.path.exists(GPU_DEVICE) or os.environ.get("SLURM_JOB_GPUS")):
        return
    advice = "this node has a GPU, but TensorFlow %s was built without CUDA: install one with CUDA (see the README)"
    if with_cuda:
        advice = (
            "this node has a GPU, but TensorFlow cannot use it: python -m pip install 'tensorflow[and-cuda]==%s' "
            "installs the libraries that it needs; nvidia-smi shows whether the driver works"
        )
    logging.warning(advice, version)


def write_settings(run: Run, train: Metadata, test: Metadata) -> None:
    """Write settings.json: every option, and the facts that identify the code and the data of the run later."""
    import tensorflow as tf

    args, replicas = run.args, run.trainer.num_replicas
    settings = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "replicas": replicas,
        "global_batch_size": args.batch_size * replicas,
        "initial_model_fingerprint": run.state.initial_model or None,
        "tensorflow_version": tf.__version__,
        **source_version(),
        "train_data": train.info,
        "test_data": test.info,
    }
    with replacing(args.output_dir / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def source_version() -> dict[str, Optional[str]]:
    """Return a hash of the suite's source files, and their git commit or None."""
    folder, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        if (folder / ".git").exists():  # not the repository of an enclosing folder
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"source_sha256": digest.hexdigest(), "git_commit": commit}


# ---------------------------------------------------------------------------------------------- processes


class Cluster(NamedTuple):
    """Rank of this process and number of processes that train one network together; 0 and 1 for a single one."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that writes files and logs for all."""
        return self.rank == 0

    @classmethod
    def find(cls, environment: "os._Environ[str]") -> "Cluster":
        """Return the cluster from TF_CONFIG, which is set from Slurm's variables under an ``srun`` of several tasks."""
        if "TF_CONFIG" not in environment and slurm_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
            task = {"type": "worker", "index": slurm_number(environment, "SLURM_PROCID")}
            cluster = {"worker": addresses_from_slurm(environment)}
            environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})  # TensorFlow reads it
        if "TF_CONFIG" not in environment:
            return cls()
        try:
            config = json.loads(environment["TF_CONFIG"])
            rank, world_size = int(config["task"]["index"]), len(config["cluster"]["worker"])
            if not 0 <= rank < world_size:
                raise ValueError(f"process {rank} of {world_size}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "expected a JSON object with the cluster's workers and this process's task in the variable TF_CONFIG, "
                f"found {environment['TF_CONFIG'][:200]!r} ({cause_of(error)}); unset it to train in one process"
            ) from error
        return cls(rank, world_size)


def addresses_from_slurm(environment: Mapping[str, str]) -> list[str]:
    """Return HOST:PORT of each task of this ``srun``, by rank; refuse hosts without an address."""
    nodes = slurm_text(environment, "SLURM_STEP_NODELIST", ".+")
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
        for host in hosts:
            socket.getaddrinfo(host, None)  # an error here, because TensorFlow would wait forever
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"cannot find the hosts {nodes} of this job: {error}; train on one node instead") from error
    of_ranks = [host for host, count in zip(hosts, tasks_of_nodes(environment)) for _ in range(count)]
    port = FIRST_PORT + slurm_number(environment, "SLURM_JOB_ID", 0) % PORTS
    return [f"{host}:{port + rank}" for rank, host in enumerate(of_ranks)]


# ---------------------------------------------------------------------------------------------- the state of a run


class TrainingError(RuntimeError):
    """Training cannot continue; the message states the step and the reason."""


@dataclass
class EarlyStopping:
    """Tracks the test loss; an improvement is more than `EARLY_STOPPING_DELTA` below the last improvement."""

    patience: int  # test epochs without improvement after which to stop
    best_loss: float = math.inf
    epochs_without_improvement: int = 0
    _reference_loss: float = field(default=math.inf, repr=False)

    def update(self, test_loss: float) -> bool:
        """Record a test loss; return whether it is the best so far."""
        if test_loss < self._reference_loss - EARLY_STOPPING_DELTA:
            self._reference_loss, self.epochs_without_improvement = test_loss, 0
        else:
            self.epochs_without_improvement += 1
        is_best = test_loss < self.best_loss
        self.best_loss = min(self.best_loss, test_loss)
        return is_best

    @property
    def is_at_plateau(self) -> bool:
        """Whether the first or the second half of the patience has just run out."""
        waited = self.epochs_without_improvement
        return waited > 0 and waited % max(self.patience // 2, 1) == 0

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.epochs_without_improvement >= self.patience


@dataclass
class RunState:
    """The state of a run, which a checkpoint contains in addition to the weights."""

    stopping: EarlyStopping
    step: int = 0  # training steps taken
    seconds: float = 0.0  # duration of the run so far
    planned_steps: int = 0  # step at which `planned_minutes` are used up; 0 before it is known
    planned_minutes: float = 0.0
    plateaus: int = 0  # how often the test loss has stopped improving
    samples: int = 0  # images taken from the training stream
    epoch: int = 0  # test epochs done
    epoch_step: int = 0  # steps since the last test epoch
    epoch_loss: float = 0.0  # sum of the losses of all counted pixels in these steps
    epoch_pixels: float = 0.0  # number of these pixels
    best_epoch: int = 0  # epoch with the lowest test loss
    initial_model: str = ""  # fingerprint of the network whose weights the run started from

    def count_step(self, loss: float, pixels: float, global_batch: int) -> None:
        """Record a training step: the mean loss of its counted pixels, the number of these pixels, and its images."""
        self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
        self.samples += global_batch
        self.epoch_loss += loss * pixels
        self.epoch_pixels += pixels

    @property
    def mean_loss(self) -> float:
        """Mean loss of the counted pixels since the last test epoch; NaN if there are none."""
        return self.epoch_loss / self.epoch_pixels if self.epoch_pixels else math.nan

    def finish_epoch(self, test_loss: float) -> bool:
        """Record a test epoch; return whether its loss is the best so far."""
        self.epoch, self.epoch_step, self.epoch_loss, self.epoch_pixels = self.epoch + 1, 0, 0.0, 0.0
        is_best = self.stopping.update(test_loss)
        self.plateaus += self.stopping.is_at_plateau
        if is_best:
            self.best_epoch = self.epoch
        return is_best

    @classmethod
    def read(cls, path: Path) -> "RunState":
        """Return the state from a checkpoint's file, which contains the result of `dataclasses.asdict`.

        Raises
        ------
        InputError
            If the file does not contain a state.
        """
        values = {**EARLIER_STATE, **read_json(path)}
        check_values(values, {**STATE_CHECKS, "stopping": lambda value: isinstance(value, dict)}, path)
        check_values(values["stopping"], STOPPING_CHECKS, path)
        stopping = EarlyStopping(**{name: values["stopping"][name] for name in STOPPING_CHECKS})
        return cls(stopping, **{name: values[name] for name in STATE_CHECKS})


MOST_STEPS = 2**53  # more than any run takes, so that no sum of steps or samples overflows
STATE_CHECKS = {
    **dict.fromkeys(
        ("step", "planned_steps", "plateaus", "samples", "epoch", "epoch_step", "best_epoch"), whole(0, MOST_STEPS)
    ),
    **dict.fromkeys(("seconds", "planned_minutes", "epoch_loss", "epoch_pixels"), real(0, 1e18)),  # more would overflow
    "initial_model": any_text,
}
# Values that are missing in checkpoints of an earlier version, and the settings with which it trained.
EARLIER_STATE = {"seconds": 0.0, "planned_steps": 0, "planned_minutes": 0.0, "plateaus": 0, "initial_model": ""}
EARLIER_SETTINGS = {"loss": "cross_entropy", "dropout": 0.5, "average_weights": 0, "deep_supervision": 0}
STOPPING_CHECKS = {
    **dict.fromkeys(("patience", "epochs_without_improvement"), whole(0, MOST_STEPS)),
    **dict.fromkeys(("best_loss", "_reference_loss"), real()),
}


def fingerprint(metadata: Metadata) -> str:
    """Return a short text that two databases share only if they have the same content."""
    content = json.dumps(metadata.info, sort_keys=True).encode() + metadata.joined_names
    return hashlib.sha256(content + metadata.pixel_counts.tobytes()).hexdigest()[:12]


def fixed_settings(args: argparse.Namespace, train: Metadata, test: Metadata) -> dict[str, Any]:
    """Return the settings that a run cannot change; databases are identified by content, as jobs copy them."""
    return {
        "number_classes": args.number_classes,
        "channels": train.image_shape[2],
        "baseline_feature_depth": args.baseline_feature_depth,
        "mixed_precision": args.mixed_precision,
        "seed": args.seed,
        **{name: getattr(args, name) for name in EARLIER_SETTINGS},
        "train_database": f"{train.count} images, fingerprint {fingerprint(train)}",
        "test_database": f"{test.count} images, fingerprint {fingerprint(test)}",
    }


class Checkpoints:
    """The last states of a run, each a folder that appears under its name only when it is complete and on disk.

    Parameters
    ----------
    output_dir : path
        Output folder of the run; checkpoints are in its folder ``checkpoint``.
    trainer : UNetTrainer
        Trainer whose variables are saved and restored.
    settings : dict
        Result of `fixed_settings`; saved with each checkpoint.
    cluster : Cluster
        Processes of the run; all have the same network, so only the chief writes.
    """

    FOLDER = "checkpoint"

    def __init__(self, output_dir: Path, trainer: "UNetTrainer", settings: dict[str, Any], cluster: Cluster) -> None:
        import tensorflow as tf

        self._folder, self._settings, self._cluster = output_dir / self.FOLDER, settings, cluster
        # The weights are saved as a list, because the layers of a model have different names in Keras 2 and Keras 3.
        self._objects = tf.train.Checkpoint(
            weights=trainer.network.weights, optimizer=trainer.optimizer, step=trainer.step
        )
        if trainer.averaged is not trainer.model:
            self._objects.averaged = trainer.averaged.weights
        self.saved_at = time.monotonic()

    @classmethod
    def find(cls, output_dir: Path) -> list[Path]:
        """Return the folders of the checkpoints in an output folder, newest first."""
        found = (output_dir / cls.FOLDER).glob("[0-9]*")
        numbered = [path for path in found if re.fullmatch("[0-9]{1,18}", path.name) and path.is_dir()]
        return sorted(numbered, key=lambda path: int(path.name), reverse=True)

    @classmethod
    def compare(cls, output_dir: Path, settings: dict[str, Any]) -> None:
        """Refuse to resume a run with other settings; needs no TensorFlow, which takes seconds to load."""
        saved = settings
        for folder in cls.find(output_dir):
            with contextlib.suppress(OSError, InputError):  # damaged; `restore` skips it as well
                values = read_json(folder / "state.json")
                check_values(values, {"settings": lambda value: isinstance(value, dict)}, folder / "state.json")
                saved = values["settings"]
                break
        for name, value in settings.items():
            before = saved.get(name, EARLIER_SETTINGS.get(name))
            if before != value:
                raise InputError(
                    f"the run in {output_dir} was started with {name} {before}, now it is {value}; resume it with the "
                    "same value, or choose another --output_dir"
                )

    def are_due(self, minutes: float) -> bool:
        """Return whether the chief should ask for another checkpoint, `minutes` after the last."""
        return self._cluster.is_chief and time.monotonic() - self.saved_at > 60 * minutes

    def save(self, state: RunState) -> None:
        """Write a checkpoint, then remove all but the last `CHECKPOINTS_KEPT`; a failure removes none."""
        if self._cluster.is_chief:
            with saving(f"a checkpoint of step {state.step} in {self._folder}"):
                self._write(state)
        self.saved_at = time.monotonic()

    def _write(self, state: RunState) -> None:
        before = self.find(self._folder.parent)
        with replacing_folder(self._folder / f"{int(before[0].name) + 1 if before else 1:06d}") as new:
            self._objects.write(os.fspath(new / "weights"))
            (new / "state.json").write_text(json.dumps({"settings": self._settings, **dataclasses.asdict(state)}))
        for old in before[CHECKPOINTS_KEPT - 1 :]:
            remove(old)

    def restore(self) -> Optional[RunState]:
        """Load the newest readable checkpoint and return its state; return None if there is no checkpoint."""
        found = self.find(self._folder.parent)
        for folder in found:
            try:
                state = RunState.read(folder / "state.json")
                with without_patterns(folder) as path:
                    self._objects.read(f"{path}/weights").assert_consumed()
                return state
            except MemoryError:
                raise
            except Exception as error:  # TensorFlow may raise anything for a damaged file
                logging.warning("checkpoint %s cannot be read (%s); trying the previous one", folder, cause_of(error))
        if found:
            raise InputError(f"no checkpoint in {self._folder} can be read; choose another --output_dir")
        return None


@contextlib.contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn errors in writing files into one-line messages."""
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        if is_out_of_memory(error):
            raise TrainingError(f"cannot create {what}: {TOO_LITTLE_MEMORY}") from error
        raise TrainingError(
            f"cannot write {what}: {cause_of(error)}. Earlier checkpoints are kept; start again to resume"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
