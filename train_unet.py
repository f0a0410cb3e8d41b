r"""Train a U-Net on the databases that build_lmdb.py made.

    python train_unet.py --train_database data/train-cells.lmdb --test_database data/test-cells.lmdb \
        --output_dir results/cells --number_classes 2

Owns the training loop, checkpoints, signals, the processes of several nodes, early stopping and logs. A run that ended
early goes on where it was when it is started again in the same way. TensorFlow is imported inside functions: the
spawned reader processes import this file again and must not pay for it, and ``-h`` should answer at once.
"""

import argparse
import atexit
import contextlib
import csv
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, Union

import numpy as np

from imagereader import STOP_SIGNALS, ImageReader, ReaderError, check_classes, z_score
from lmdb_utils import (
    RADIUS,
    SIZE_FACTOR,
    Database,
    InputError,
    Metadata,
    Parser,
    Progress,
    add_flag,
    configure_logging,
    flush_to_disk,
    log_settings,
    number_type,
    positive_float,
    positive_int,
    replacing,
    run_script,
    seed_int,
)

if TYPE_CHECKING:
    from unet_model import UNetTrainer

WARM_UP_FACTOR = 0.1  # of the learning rate, in the first epoch
WARM_UP_STEPS = 1000  # at most
EARLY_STOPPING_DELTA = 1e-4  # a test loss must fall by more than this to count as an improvement
CHECKPOINTS_KEPT = 2
EXAMPLES = 4  # test images in the picture of predictions
ADVISE_WAIT_SHARE, ADVISE_QUEUE_FILL = 0.05, 0.5  # more waiting than this with an emptier queue: readers are too slow
SAME_REQUEST_SECONDS = 5.0  # a signal that comes again so soon is the same one: Slurm and scripts send it twice
FIRST_PORT, PORTS = 15000, 10000  # for the processes of a Slurm job to talk to each other
EXIT_FAILURE = 1
GPU_DEVICE = "/dev/nvidiactl"  # what the driver of NVIDIA makes, where it finds a GPU
EXIT_STOPPED = 85  # by a signal, with a checkpoint: start again to go on


def build_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = Parser("train_unet", "Script which trains a unet model")
    add_data_options(parser.add_argument_group("data"))
    add_training_options(parser.add_argument_group("training"))
    add_run_options(parser.add_argument_group("network and run"))
    return parser


def add_data_options(group: Any) -> None:
    """Add the required options: where the data is and where results go."""
    required = {"required": True, "default": argparse.SUPPRESS}
    for side in ("train", "test"):
        metavar = f"{side.upper()}_DATABASE_FILEPATH"
        text = f"lmdb database to use for {side}ing, from build_lmdb.py (Required)"
        group.add_argument(f"--{side}_database", metavar=metavar, **required, help=text)
    text = "Folder where outputs will be saved: a new one, or that of a run to go on with (Required)"
    group.add_argument("--output_dir", metavar="OUTPUT_FOLDER", type=Path, **required, help=text)


def add_training_options(group: Any) -> None:
    """Add what the specification lists besides the data."""
    group.add_argument("--batch_size", type=positive_int, default=4, help="images in a batch, for each GPU")
    group.add_argument(
        "--number_classes", type=positive_int, default=2, help="classes being segmented, background (0) included"
    )
    text = "of the Adam optimizer; a tenth of it in the first epoch, for at most 1000 steps"
    group.add_argument("--learning_rate", type=positive_float, default=3e-4, help=text)
    group.add_argument(
        "--test_every_n_steps",
        type=positive_int,
        default=1000,
        help="number of gradient update steps to take between test epochs, which makes an epoch here, however small "
        "the data set",
    )
    text = "whether to balance classes [0 = false, 1 = true]: draw each equally often, then an image that holds it"
    add_flag(group, "--balance_classes", 0, text)
    add_flag(
        group,
        "--use_augmentation",
        1,
        "whether to use data augmentation [0 = false, 1 = true]: transform each training image at random",
    )
    group.add_argument(
        "--early_stopping",
        metavar="EARLY_STOPPING_COUNT",
        type=positive_int,
        default=10,
        help="Perform early stopping when the test loss does not improve (by more than 1e-4) for N test epochs",
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
        help="features of the network's top level, doubled at each of the four levels below; 8 or 16 train on a laptop",
    )
    text = "stop after so many test epochs; without it only --early_stopping ends a run"
    group.add_argument("--max_epochs", type=positive_int, default=None, help=text)
    text = "seed of the image order, the augmentation, dropout and the network's first weights"
    group.add_argument("--seed", type=seed_int, default=0, help=text)
    text = "auto goes on with the run that --output_dir holds, never insists on an empty folder"
    group.add_argument("--resume", choices=("auto", "never"), default="auto", help=text)
    text = "minutes between checkpoints, besides those of each test epoch"
    group.add_argument("--checkpoint_minutes", type=positive_float, default=10.0, help=text)
    text = "factor of each class in the loss, such as 1,5,5; auto lets all classes weigh the same in total"
    group.add_argument("--class_weights", type=class_weights, help=text)
    text = "share of the target, 0 to below 1, that is spread over all classes while training"
    group.add_argument("--label_smoothing", type=share_float, default=0.0, help=text)
    text = (
        "whether to compute in float16 with float32 weights and a scaled loss, for GPUs that are faster so (V100 and "
        "later); the exported model is float32 [0 = false, 1 = true]"
    )
    add_flag(group, "--mixed_precision", 0, text)
    text = "whether to repeat a run bit by bit on the same machine, more slowly [0 = false, 1 = true]"
    add_flag(group, "--deterministic", 0, text)


share_float = number_type(float, lambda value: 0 <= value < 1, "a number from 0 to below 1, such as 0.1")


def class_weights(text: str) -> Union[str, list[float]]:
    """Return ``"auto"``, or a list of positive numbers; the ``type`` of a command-line option."""
    return text if text == "auto" else [positive_float(part) for part in text.split(",")]


def main(argv: Optional[list[str]] = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    configure_logging()
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> NoReturn:
    """Check the input, then train and end the process; what can go wrong ends in a message and an exit code."""
    metadata = read_metadata(args)
    weights = weights_of_classes(args, metadata[0])
    Checkpoints.compare(args.output_dir, identity_of(args, *metadata))
    stop = StopRequest()
    stop.watch()
    cluster = Cluster.find(os.environ)
    if cluster.is_chief:
        prepare_output_dir(args.output_dir, args.resume)
    else:
        logging.getLogger().setLevel(logging.WARNING)  # the chief speaks for all
    log_settings(args)
    strategy = make_strategy(cluster, bool(args.deterministic))
    stop.watch()  # again: a strategy of several processes takes SIGTERM for itself
    code = EXIT_FAILURE
    try:
        with Training(args, cluster, strategy, stop, metadata, weights) as training:
            code = training.run()
    except TrainingError as error:
        logging.error("%s", error)
    except ReaderError:  # logged in full when it happened
        logging.error("training stopped, because a reader failed (see above); what was saved before is kept")
    # Everything is written, and the readers have ended. A tidy exit would wait for up to a minute: TensorFlow joins the
    # thread that tunes an iterator, and sleeps for longer and longer, before it destroys the iterator; and processes
    # that train together wait for each other. So this ends as a forked process of multiprocessing does: what is
    # registered to be run at the exit is run (TensorFlow removes its temporary files), nothing is destroyed.
    atexit._run_exitfuncs()
    os._exit(code)


# ---------------------------------------------------------------------------------------------- preparation


def read_metadata(args: argparse.Namespace) -> tuple[Metadata, Metadata]:
    """Return the metadata of both databases, which must hold images of one kind."""
    found = []
    for filepath in (args.train_database, args.test_database):
        with Database(filepath) as database:
            found.append(database.metadata)
        check_classes(found[-1], args.number_classes, filepath)
    train, test = found
    for option in ("label_map", "channels"):
        one, other = train.info.get(option), test.info.get(option)
        if one != other:
            raise InputError(
                f"expected databases of one --{option}, found {one} in {args.train_database} and {other} in "
                f"{args.test_database}; build them together with build_lmdb.py"
            )
    if train.image_shape != test.image_shape:
        raise InputError(
            f"expected images of one size in both databases, found {train.image_shape} in {args.train_database} and "
            f"{test.image_shape} in {args.test_database}; build them together with build_lmdb.py"
        )
    compare_sides(args, train, test)
    height, width, _ = train.image_shape
    if height % SIZE_FACTOR or width % SIZE_FACTOR:
        raise InputError(
            f"expected image sizes that are multiples of {SIZE_FACTOR}, found {height} x {width}; build again"
        )
    return train, test


def compare_sides(args: argparse.Namespace, train: Metadata, test: Metadata) -> None:
    """Refuse to test on the training data, and warn where the test loss may look better than the network is."""
    if fingerprint(train) == fingerprint(test):
        raise InputError(
            f"{args.train_database} and {args.test_database} hold the same images; give the train and the test "
            "database that build_lmdb.py wrote"
        )
    if (train.info.get("side"), test.info.get("side")) == ("test", "train"):
        logging.warning("--train_database is the test side of a dataset, --test_database the train side: swapped?")
    shared = set(train.names) & set(test.names)
    if shared:
        logging.warning(
            "%d names of images are in both databases, such as %s: if these are the same images, the test loss looks "
            "better than the network is; take the train and test database of one build",
            len(shared),
            min(shared),
        )


def weights_of_classes(args: argparse.Namespace, train: Metadata) -> Optional[list[float]]:
    """Return the factor of each class in the loss; name classes that no training image holds."""
    counts = dict(zip(train.classes.tolist(), train.pixel_counts.tolist()))
    absent = [class_id for class_id in range(args.number_classes) if class_id not in counts]
    if absent:
        shown = ", ".join(map(str, absent))
        logging.warning("no training image holds class %s: it is left out of balancing and cannot be learnt", shown)
    if args.class_weights == "auto":
        each = sum(counts.values()) / len(counts)
        return [each / counts[class_id] if class_id in counts else 1.0 for class_id in range(args.number_classes)]
    if args.class_weights is not None and len(args.class_weights) != args.number_classes:
        raise InputError(
            f"expected {args.number_classes} --class_weights, one for each class, got {len(args.class_weights)}"
        )
    weights: Optional[list[float]] = args.class_weights
    return weights


def prepare_output_dir(folder: Path, resume: str) -> None:
    """Create the output folder, refuse one that cannot be gone on with, and start the log file in it."""
    if resume == "never" and folder.exists() and any(folder.iterdir()):
        raise InputError(f"expected an empty --output_dir with --resume never, found files in {folder}; choose another")
    metrics = folder / "metrics.csv"
    if not Checkpoints.find(folder) and metrics.exists() and len(metrics.read_text().splitlines()) > 1:
        raise InputError(f"{folder} holds results but no checkpoint to go on from; choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log_file = logging.FileHandler(folder / "train.log")
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}; choose another folder") from error
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(log_file)


def make_strategy(cluster: "Cluster", deterministic: bool = False) -> Any:
    """Return a strategy over all visible GPUs of all processes, or over the CPU where there is none, and say which."""
    import tensorflow as tf

    if deterministic:
        tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        logging.info("training on %d GPU%s: %s", len(gpus), "s" * (len(gpus) > 1), ", ".join(gpu.name for gpu in gpus))
    else:
        report_no_gpu(tf.__version__, tf.test.is_built_with_cuda())
    if cluster.processes > 1:
        logging.info("process %d of %d, waiting for the others", cluster.process + 1, cluster.processes)
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.MirroredStrategy(None if gpus else ["CPU:0"])


def report_no_gpu(version: str, with_cuda: bool) -> None:
    """Say that the CPU trains, and warn with the way out where a GPU seems to have been meant for it."""
    logging.info("training on the CPU: TensorFlow %s sees no GPU", version)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not (os.path.exists(GPU_DEVICE) or os.environ.get("SLURM_JOB_GPUS")):
        return
    if with_cuda:
        logging.warning(
            "this node has a GPU, but TensorFlow cannot use it: python -m pip install 'tensorflow[and-cuda]==%s' "
            "brings the libraries that it needs; nvidia-smi tells whether the driver works",
            version,
        )
    else:
        logging.warning(
            "this node has a GPU, but TensorFlow %s was built without CUDA: install one for GPUs (see the README)",
            version,
        )


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
    with replacing(args.output_dir / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def saved_model_metadata(args: argparse.Namespace, train: Metadata) -> dict[str, Any]:
    """Return what inference must know about the network."""
    return {
        "number_classes": args.number_classes,
        "channels": train.image_shape[2],
        "source_channels": train.info.get("channels"),
        "label_map": train.info.get("label_map"),
        "radius": RADIUS,
        "size_factor": SIZE_FACTOR,
        "normalization": "z-score of each image and channel; only centred where the standard deviation is at most 1",
        "baseline_feature_depth": args.baseline_feature_depth,
    }


# ---------------------------------------------------------------------------------------------- processes and signals


class Cluster(NamedTuple):
    """Which of how many processes this is that train one network together."""

    process: int = 0
    processes: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that writes files and speaks for all."""
        return self.process == 0

    @classmethod
    def find(cls, environment: "os._Environ[str]") -> "Cluster":
        """Return what TF_CONFIG says, which is made from Slurm's variables under an ``srun`` of several tasks."""
        if "TF_CONFIG" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            task = {"type": "worker", "index": int(environment["SLURM_PROCID"])}
            cluster = {"worker": addresses_from_slurm(environment)}
            environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})  # where TensorFlow looks
        if "TF_CONFIG" not in environment:
            return cls()
        config = json.loads(environment["TF_CONFIG"])
        return cls(int(config["task"]["index"]), len(config["cluster"]["worker"]))


def addresses_from_slurm(environment: Mapping[str, str]) -> list[str]:
    """Return HOST:PORT of each task of this ``srun``, in the order of their ranks.

    Raises
    ------
    InputError
        If a host has no address, for which TensorFlow would wait for ever.
    """
    nodes = environment["SLURM_STEP_NODELIST"]
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
        for host in hosts:
            socket.getaddrinfo(host, None)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"cannot find the computers {nodes} of this job: {error}; train on one node instead"
        ) from error
    counts: list[int] = []  # of the tasks on each node, from such as "2(x3),1"
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(repeated or 1)
    of_ranks = [host for host, count in zip(hosts, counts) for _ in range(count)]
    port = FIRST_PORT + int(environment.get("SLURM_JOB_ID", 0)) % PORTS
    return [f"{host}:{port + rank}" for rank, host in enumerate(of_ranks)]


class StopRequest:
    """Notes a signal that asks to stop, for the training loop to answer; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None
        self._since = 0.0

    def watch(self) -> None:
        """Take over SIGINT, SIGTERM and SIGUSR1."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        # No logging here: the signal may have interrupted a line that is being written.
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
            os.write(2, b"\nfinishing the step in hand, then saving; the same once more ends at once\n")
        elif number == signal.SIGINT or time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + number)  # the readers notice, and end as well

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None


# ---------------------------------------------------------------------------------------------- where a run stands


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


@dataclass
class RunState:
    """Where a run stands: what a checkpoint holds besides the weights.

    Attributes
    ----------
    step : int
        Training steps taken.
    samples : int
        Images that these took from the training stream.
    epoch : int
        Test epochs done.
    epoch_step : int
        Steps since the last test epoch.
    epoch_loss : float
        Sum of the losses of these steps.
    best_epoch : int
        Test epoch of the lowest test loss.
    stopping : EarlyStopping
    """

    stopping: EarlyStopping
    step: int = 0
    samples: int = 0
    epoch: int = 0
    epoch_step: int = 0
    epoch_loss: float = 0.0
    best_epoch: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """Return the state that `dataclasses.asdict` took apart."""
        return cls(**{**values, "stopping": EarlyStopping(**values["stopping"])})


def fingerprint(metadata: Metadata) -> str:
    """Return a short text that two databases share only if they hold the same."""
    content = json.dumps(metadata.info, sort_keys=True).encode() + metadata.joined_names
    return hashlib.sha256(content + metadata.pixel_counts.tobytes()).hexdigest()[:12]


def identity_of(args: argparse.Namespace, train: Metadata, test: Metadata) -> dict[str, Any]:
    """Return the settings that a run cannot change half-way; databases by their content, as jobs copy them about."""
    return {
        "number_classes": args.number_classes,
        "channels": train.image_shape[2],
        "baseline_feature_depth": args.baseline_feature_depth,
        "mixed_precision": args.mixed_precision,
        "seed": args.seed,
        "train_database": f"{train.count} images, fingerprint {fingerprint(train)}",
        "test_database": f"{test.count} images, fingerprint {fingerprint(test)}",
    }


class Checkpoints:
    """The last states of a run, each a folder that appears under its name only when it is whole and on the disk.

    Parameters
    ----------
    output_dir : path
        Of the run; they lie in its folder ``checkpoint``.
    trainer : UNetTrainer
        Whose variables are saved and restored.
    identity : dict
        From `identity_of`; saved along.
    cluster : Cluster
        All processes have to save, as some weights are put together from theirs; only the chief keeps the result.
    """

    def __init__(self, output_dir: Path, trainer: "UNetTrainer", identity: dict[str, Any], cluster: Cluster) -> None:
        import tensorflow as tf

        self._folder, self._identity, self._cluster = output_dir / "checkpoint", identity, cluster
        self._objects = tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer, step=trainer.step)
        self.saved_at = time.monotonic()

    @staticmethod
    def find(output_dir: Path) -> list[Path]:
        """Return the folders of the checkpoints in an output folder, the newest first."""
        found = (path for path in (output_dir / "checkpoint").glob("[0-9]*") if path.is_dir())
        return sorted(found, reverse=True)

    @classmethod
    def compare(cls, output_dir: Path, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run of other settings; needs no TensorFlow, which takes seconds to load.

        Raises
        ------
        InputError
            If the newest checkpoint was saved with another identity.
        """
        saved = identity
        for folder in cls.find(output_dir):
            with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: `restore` passes over it as well
                saved = json.loads((folder / "state.json").read_text())["settings"]
                break
        for name, value in identity.items():
            if saved.get(name) != value:
                raise InputError(
                    f"the run in {output_dir} was begun with {name} {saved.get(name)}, now it is {value}; go on as it "
                    "was begun, or choose another --output_dir"
                )

    def save(self, state: RunState) -> None:
        """Write a checkpoint, and remove all but the last `CHECKPOINTS_KEPT`.

        Raises
        ------
        TrainingError
            If it cannot be written; earlier ones are untouched.
        """
        with writing(f"a checkpoint of step {state.step} in {self._folder}"):
            if self._cluster.is_chief:
                self._write(state)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    self._objects.write(f"{folder}/weights")
        self.saved_at = time.monotonic()

    def _write(self, state: RunState) -> None:
        new = self._folder / "incomplete"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            self._objects.write(os.fspath(new / "weights"))
            (new / "state.json").write_text(json.dumps({"settings": self._identity, **dataclasses.asdict(state)}))
            for path in [*new.iterdir(), new]:
                flush_to_disk(path)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        before = self.find(self._folder.parent)
        new.rename(self._folder / f"{int(before[0].name) + 1 if before else 1:06d}")
        flush_to_disk(self._folder)
        for old in before[CHECKPOINTS_KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> Optional[RunState]:
        """Load the newest checkpoint that can be read; return its state, or None where there is no checkpoint.

        Raises
        ------
        InputError
            If none can be read.
        """
        found = self.find(self._folder.parent)
        for folder in found:
            try:
                values = json.loads((folder / "state.json").read_text())
                del values["settings"]
                self._objects.read(os.fspath(folder / "weights")).assert_consumed()
                return RunState.from_dict(values)
            except Exception as error:  # TensorFlow raises whatever comes of reading a damaged file
                logging.warning("checkpoint %s cannot be read (%s): trying the one before", folder, error)
        if found:
            raise InputError(f"no checkpoint in {self._folder} can be read; choose another --output_dir")
        return None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn errors of writing files into one line."""
    import tensorflow as tf

    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"cannot write {what}: {reason}; the checkpoints before are kept. Free some space and start again"
        ) from error


# ---------------------------------------------------------------------------------------------- training


class Training:
    """A run: the network, its readers, and where it stands; a context manager that stops the readers.

    Parameters
    ----------
    args : argparse.Namespace
        The command line.
    cluster : Cluster
        The processes that train together.
    strategy : tf.distribute.Strategy
        From `make_strategy`.
    stop : StopRequest
        Asked after each step.
    metadata : (Metadata, Metadata)
        Of the training and the test database.
    weights : list of float, optional
        Factor of each class in the loss.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        cluster: Cluster,
        strategy: Any,
        stop: StopRequest,
        metadata: tuple[Metadata, Metadata],
        weights: Optional[list[float]],
    ) -> None:
        self._args, self._cluster, self._stop = args, cluster, stop
        self._trainer, self._portable = build_networks(args, strategy, metadata[0].image_shape[2], weights)
        self._global_batch = args.batch_size * self._trainer.num_replicas
        self._checkpoints = Checkpoints(args.output_dir, self._trainer, identity_of(args, *metadata), cluster)
        restored = self._checkpoints.restore()
        self._state = restored or RunState(EarlyStopping(args.early_stopping))
        self._state.stopping.patience = args.early_stopping
        self._supply_figures: dict[str, float] = {}
        self._resources = contextlib.ExitStack()
        self._report: Optional[Report] = None
        if cluster.is_chief:
            with writing(f"results in {args.output_dir}"):
                write_settings(args, *metadata, self._trainer.num_replicas)
                self._report = Report(args, self._state.epoch)
        logging.info(
            "network of %s weights, global batch of %d images",
            f"{self._trainer.model.count_params():,}", self._global_batch,
        )  # fmt: skip
        if restored:
            logging.info("going on at step %d, after %d test epochs", self._state.step, self._state.epoch)

    def __enter__(self) -> "Training":
        """Start the readers where the run stands."""
        args = self._args
        self._train_reader = self._open_reader(
            args.train_database,
            name="train reader",
            use_augmentation=bool(args.use_augmentation),
            balance_classes=bool(args.balance_classes),
            shuffle=True,
            first_sample=self._state.samples,
        )
        self._test_reader = self._open_reader(args.test_database, name="test reader", shuffle=False)
        self._train_batches = self._resources.enter_context(open_batches(self._trainer, self._train_reader))
        self._test_batches = self._resources.enter_context(open_batches(self._trainer, self._test_reader))
        self._first_step = self._state.step
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the readers."""
        self._resources.close()

    def _open_reader(self, database: str, **options: Any) -> ImageReader:
        replicas = self._trainer.num_replicas // self._cluster.processes
        reader = ImageReader(
            database,
            num_workers=self._args.reader_count * replicas,
            number_classes=self._args.number_classes,
            batch_size=self._args.batch_size,
            seed=self._args.seed,
            replicas=replicas,
            process=self._cluster.process,
            processes=self._cluster.processes,
            **options,
        )
        return self._resources.enter_context(reader)

    def run(self) -> int:
        """Train until the test loss stops improving, `max_epochs` is reached or a signal comes; return the exit code.

        Raises
        ------
        TrainingError
            If the loss is not finite, memory or disk run out, or another process has gone.
        """
        import tensorflow as tf

        try:
            while not self._reason_to_end():
                in_epoch = self._state.epoch_step < self._args.test_every_n_steps
                stopped = self._train_steps() if in_epoch else self._test()
                if stopped:
                    self._checkpoints.save(self._state)
                    name = self._stop.signal.name if self._stop.signal else "a signal to another process"
                    logging.info(
                        "stopped by %s at step %d, with a checkpoint; start again to go on", name, self._state.step
                    )
                    if self._state.best_epoch:
                        logging.info("the best model so far is in %s", self._args.output_dir / "saved_model")
                    return EXIT_STOPPED
        except tf.errors.ResourceExhaustedError as error:
            raise TrainingError("the GPU has too little memory: lower --batch_size or crop smaller tiles") from error
        except tf.errors.OpError as error:
            if self._cluster.processes == 1:
                raise
            found = re.search(r"aborted by: (.*)", error.message)
            reason = found[1] if found else error.message.splitlines()[0]
            raise TrainingError(
                f"another process of this job has failed or gone; start again to go on (TensorFlow says: {reason})"
            ) from error
        if self._report is not None:
            self._report.conclude(self._reason_to_end(), self._state)
        return 0

    def _reason_to_end(self) -> str:
        """Return why the run is done, or nothing."""
        if self._state.stopping.should_stop:
            return f"the test loss has not improved for {self._args.early_stopping} epochs"
        if self._args.max_epochs is not None and self._state.epoch >= self._args.max_epochs:
            return "last epoch reached"
        return ""

    def _train_steps(self) -> bool:
        """Train to the next test epoch; return whether a signal has come before."""
        args, state, steps = self._args, self._state, self._args.test_every_n_steps
        label = f"epoch {state.epoch + 1} step"
        progress = Progress(label, steps, "", self._global_batch, "images", first=state.epoch_step)
        supply = Supply(self._train_batches, self._train_reader)
        stopped, first, start = False, state.epoch_step, time.monotonic()
        while state.epoch_step < steps and not stopped:
            self._trainer.set_learning_rate(learning_rate_at(state, args))
            save = (
                self._cluster.is_chief and time.monotonic() - self._checkpoints.saved_at > 60 * args.checkpoint_minutes
            )
            sums = self._trainer.train_step(supply.take(), (bool(self._stop), save))
            loss, stopped = float(sums[0]), bool(sums[1])
            if not math.isfinite(loss):
                raise TrainingError(self._describe_loss(loss))
            state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
            state.samples += self._global_batch
            state.epoch_loss += loss
            progress.update(state.epoch_step, f"loss {loss:.4f}, {supply},")
            if sums[2] and not stopped:
                self._checkpoints.save(state)
        progress.close()
        supply.advise(args.reader_count)
        images_per_second = (state.epoch_step - first) * self._global_batch / (time.monotonic() - start)
        self._supply_figures = {"images_per_second": images_per_second, **supply.figures()}
        return stopped

    def _describe_loss(self, loss: float) -> str:
        step, rate = self._state.step, learning_rate_at(self._state, self._args)
        records = ", ".join(self._train_reader.describe_step(step - self._first_step))
        return (
            f"the loss became {loss} at step {step + 1} (learning rate {rate:g}); the last checkpoint is kept. Lower "
            f"--learning_rate and look for broken images. The batch was {records}"
        )

    def _test(self) -> bool:
        """Do a test epoch and keep its results; return whether a signal has come before its end."""
        state, args = self._state, self._args
        figures = self._evaluate()
        if figures is None:
            return True
        train_figures = {
            "loss": state.epoch_loss / state.epoch_step,
            "learning_rate": learning_rate_at(dataclasses.replace(state, step=state.step - 1), args),
            **self._supply_figures,
        }
        state.epoch, state.epoch_step, state.epoch_loss = state.epoch + 1, 0, 0.0
        is_best = state.stopping.update(figures["loss"])
        if is_best:
            state.best_epoch = state.epoch
        self._portable.set_weights(self._trainer.model.get_weights())  # in all processes, which may have to talk
        if self._report is not None:
            with writing(f"the results of epoch {state.epoch} in {args.output_dir}"):
                self._report.write(state, train_figures, figures, self._portable)
                if is_best:
                    self._export()
        self._checkpoints.save(state)
        return False

    def _evaluate(self) -> Optional[dict[str, Any]]:
        """Evaluate each test image once; return mean loss and `score_confusion`'s figures, None if stopped."""
        from unet_model import score_confusion

        count, steps = self._test_reader.get_image_count(), self._test_reader.get_pass_steps()
        progress = Progress("test step", steps, "", count / steps, "images")
        loss_sum, confusion = 0.0, np.zeros((), np.int64)
        for step in range(steps):
            sums, counts = self._trainer.test_step(take(self._test_batches, self._test_reader), (bool(self._stop),))
            if sums[1]:
                return None
            loss_sum += float(sums[0])
            confusion = confusion + counts
            progress.update(step + 1)
        progress.close()
        return {"loss": loss_sum / count, "confusion": confusion, **score_confusion(confusion)}

    def _export(self) -> None:
        from unet_model import export_saved_model

        metadata = saved_model_metadata(self._args, self._train_reader.metadata)
        export_saved_model(self._portable, self._args.output_dir / "saved_model", metadata)


def build_networks(
    args: argparse.Namespace, strategy: Any, channels: int, weights: Optional[list[float]]
) -> tuple["UNetTrainer", Any]:
    """Return the network in training, and one like it in float32 on one device: to export and to draw."""
    import tensorflow as tf

    from unet_model import UNetTrainer, build_unet

    tf.keras.utils.set_random_seed(args.seed)
    network = channels, args.number_classes, args.baseline_feature_depth
    precision = "mixed_float16" if args.mixed_precision else "float32"
    trainer = UNetTrainer(
        strategy,
        lambda dropout_key: build_unet(*network, dropout_key=dropout_key, precision=precision),
        args.number_classes,
        args.learning_rate,
        args.seed,
        args.label_smoothing,
        weights,
        bool(args.mixed_precision),
    )
    return trainer, build_unet(*network)


def learning_rate_at(state: RunState, args: argparse.Namespace) -> float:
    """Return the learning rate of the next step: a tenth in the first epoch, at most so many steps, as warm-up."""
    warm_up = state.step < min(args.test_every_n_steps, WARM_UP_STEPS)
    rate: float = args.learning_rate * (WARM_UP_FACTOR if warm_up else 1.0)
    return rate


@contextlib.contextmanager
def open_batches(trainer: "UNetTrainer", reader: ImageReader) -> Iterator[Any]:
    """Yield an endless iterator over global batches; stop the reader and run the iterator dry at the end.

    TensorFlow destroys an iterator in the thread that drops it, with Python's lock held, and waits there for its
    prefetching threads. If one of these is about to call the generator, it waits for that lock, and so both for ever. A
    generator that has ended is not called again.
    """
    batches = trainer.distribute(reader)
    try:
        yield batches
    finally:
        reader.shutdown()
        with contextlib.suppress(Exception):  # a failed reader ends the stream with its error, reported already
            for _ in batches:
                pass


class Supply:
    """Takes global batches from the readers, and measures how well these keep up."""

    def __init__(self, batches: Any, reader: ImageReader) -> None:
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


def take(batches: Any, reader: ImageReader) -> Any:
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
    """Writes the figures of each test epoch: CSV files, pictures, TensorBoard, and the log.

    Parameters
    ----------
    args : argparse.Namespace
        The command line.
    epoch : int
        Test epochs done; what the files hold of later ones, from a run that was killed, is dropped.
    """

    def __init__(self, args: argparse.Namespace, epoch: int) -> None:
        import tensorflow as tf

        self._folder = args.output_dir
        self._writers = {
            name: tf.summary.create_file_writer(os.fspath(self._folder / f"tensorboard-{name}"))
            for name in ("train", "test")
        }
        self._examples = read_examples(args.test_database)
        self._classes = range(args.number_classes)
        scores = [f"{score}_{class_id}" for score in ("iou", "dice") for class_id in self._classes]
        head = ["epoch", "step", "learning_rate", "train_loss", "test_loss", "accuracy", "mean_iou"]
        self._begin("metrics.csv", [*head, *scores], epoch)
        self._begin("test_loss.csv", ["epoch", "test_loss"], epoch)
        predicted = [f"predicted_{class_id}" for class_id in self._classes]
        self._begin("confusion.csv", ["epoch", "true_class", *predicted], epoch)

    def write(self, state: RunState, train: dict[str, float], test: dict[str, Any], model: Any) -> None:
        """Write the results of a test epoch.

        Parameters
        ----------
        state : RunState
            Where the run stands.
        train : dict
            ``loss`` and ``learning_rate``, and of what was measured ``images_per_second`` and `Supply`'s figures.
        test : dict
            ``loss``, ``confusion``, and the figures of `unet_model.score_confusion`.
        model : keras.Model
            Gives logits for the pictures.
        """
        mean_iou = mean_of_present(test["iou"])
        scores = [text_of_score(score) for score in (test["accuracy"], mean_iou, *test["iou"], *test["dice"])]
        losses = [f"{train['loss']:.6f}", f"{test['loss']:.6f}"]
        self._append("metrics.csv", [state.epoch, state.step, f"{train['learning_rate']:g}", *losses, *scores])
        self._append("test_loss.csv", [state.epoch, losses[1]])
        for class_id, row in enumerate(test["confusion"]):
            self._append("confusion.csv", [state.epoch, class_id, *row])
        pictures = {
            "curves": draw_curves(self._folder / "metrics.csv", self._classes),
            "predictions": draw_predictions(self._examples, model, len(self._classes)),
            "confusion": draw_confusion(test["confusion"]),
        }
        for name in ("curves", "predictions"):
            with replacing(self._folder / f"{name}.png") as path:
                pictures[name].savefig(path, dpi=100)
        self._write_tensorboard(state.step, train, {**test, "mean_iou": mean_iou}, pictures)
        self._log(state, train, test)

    def conclude(self, reason: str, state: RunState) -> None:
        """Log how the run ended, the best figures of each class, and where everything lies."""
        with open(self._folder / "metrics.csv", newline="") as file:
            best = next(row for row in csv.DictReader(file) if int(row["epoch"]) == state.best_epoch)
        logging.info(
            "done: %s; best test loss %.4f, in epoch %d of %d", reason, state.stopping.best_loss, state.best_epoch,
            state.epoch,
        )  # fmt: skip
        for class_id in self._classes:
            iou, dice = best[f"iou_{class_id}"], best[f"dice_{class_id}"]
            logging.info("class %d: %s", class_id, f"IoU {iou}, Dice {dice}" if iou else "absent from the test images")
            if iou and float(iou) == 0:
                logging.warning(
                    "the network finds nothing of class %d: train longer, with a lower --learning_rate, or let rare "
                    "classes weigh more with --balance_classes 1 or --class_weights auto", class_id,
                )  # fmt: skip
        logging.info("the model is in %s", self._folder / "saved_model")
        logging.info(
            "look at predictions.png and curves.png in %s, or at: tensorboard --logdir %s", self._folder, self._folder
        )

    def _log(self, state: RunState, train: dict[str, float], test: dict[str, Any]) -> None:
        dice = ", ".join("absent" if math.isnan(score) else f"{score:.3f}" for score in test["dice"])
        speed = ""
        if "images_per_second" in train:
            speed = (
                f"; {train['images_per_second']:.1f} images/s, queue {train['reader/queue_fill']:.0%} full, waited for "
                f"data {train['reader/wait_share']:.0%}"
            )
        logging.info(
            "epoch %d step %d: train loss %.4f, test loss %.4f%s, accuracy %.4f, Dice of each class %s%s",
            state.epoch, state.step, train["loss"], test["loss"],
            " (best)" if state.best_epoch == state.epoch else "", test["accuracy"], dice, speed,
        )  # fmt: skip

    def _write_tensorboard(
        self, step: int, train: dict[str, float], test: dict[str, Any], pictures: dict[str, Any]
    ) -> None:
        import tensorflow as tf

        with self._writers["train"].as_default(step):
            for name, value in train.items():
                tf.summary.scalar(name, value)
            self._writers["train"].flush()
        with self._writers["test"].as_default(step):
            for name in ("loss", "accuracy", "mean_iou"):
                tf.summary.scalar(name, test[name])
            for name in ("iou", "dice"):
                for class_id, value in enumerate(test[name]):
                    if not math.isnan(value):
                        tf.summary.scalar(f"{name}/class_{class_id}", value)
            for name in ("predictions", "confusion"):
                tf.summary.image(name, pixels_of(pictures[name])[None])
            self._writers["test"].flush()

    def _begin(self, name: str, columns: list[str], epoch: int) -> None:
        """Begin a CSV file, with the rows of earlier epochs where there are some."""
        rows: list[list[str]] = []
        if (self._folder / name).exists():
            with open(self._folder / name, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdecimal() and int(row[0]) <= epoch]
        with replacing(self._folder / name) as path, open(path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])

    def _append(self, name: str, row: Sequence[Any]) -> None:
        """Append one row to a CSV file; opened and closed each time, so that a killed job has lost nothing."""
        with open(self._folder / name, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def mean_of_present(scores: np.ndarray) -> float:
    """Return the mean over the classes that occur; NaN where none does."""
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if len(present) else math.nan


def text_of_score(score: float) -> str:
    """Return a score for a CSV file; an absent class has none."""
    return "" if math.isnan(score) else f"{score:.6f}"


# ---------------------------------------------------------------------------------------------- pictures


def read_examples(database: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return z-scores (H, W, C) and masks (H, W) of a few images, spread over a database."""
    with Database(database) as opened:
        count = opened.metadata.count
        chosen = np.unique(np.linspace(0, count - 1, EXAMPLES).astype(int))
        pairs = [opened.read(int(record)) for record in chosen]
        return [(z_score(image), np.array(mask)) for image, mask in pairs]


def draw_predictions(examples: list[tuple[np.ndarray, np.ndarray]], model: Any, number_classes: int) -> Any:
    """Return a figure with a row for each example: image, truth, prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.5 * len(examples)), layout="constrained")
    axes = figure.subplots(len(examples), 3, squeeze=False)
    colours = {"cmap": "viridis", "vmin": 0, "vmax": max(number_classes - 1, 1), "interpolation": "nearest"}
    for row, (image, mask) in zip(axes, examples):
        gray = image if image.shape[2] == 3 else image.mean(axis=2)
        row[0].imshow(np.clip(0.5 + gray / 5, 0, 1), cmap="gray", vmin=0, vmax=1)
        row[1].imshow(mask, **colours)
        row[2].imshow(np.argmax(model(image[None], training=False)[0], axis=-1), **colours)
        for place in row:
            place.set_axis_off()
    for place, title in zip(axes[0], ("image", "truth", "prediction")):
        place.set_title(title)
    return figure


def draw_curves(metrics: Path, classes: range) -> Any:
    """Return a figure of the losses and the scores of each class, from metrics.csv."""
    from matplotlib.figure import Figure

    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for axes, names in (
        (losses, ["train_loss", "test_loss"]),
        (scores, ["accuracy", *(f"dice_{class_id}" for class_id in classes)]),
    ):
        for name in names:
            axes.plot(steps, [float(row[name] or "nan") for row in rows], marker=".", label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.legend()
    return figure


def draw_confusion(confusion: np.ndarray) -> Any:
    """Return a figure of a confusion matrix, as shares of each true class."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    edge = 2 + 0.5 * len(confusion)
    figure = Figure(figsize=(edge, edge), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true_class, row in enumerate(shares):
        for predicted, share in enumerate(row):
            axes.text(predicted, true_class, f"{share:.1%}", ha="center", va="center", color="gray", size=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def pixels_of(figure: Any) -> np.ndarray:
    """Return a figure as an array of uint8, shape (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


if __name__ == "__main__":
    sys.exit(main())
