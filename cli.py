"""How a script meets its user and its operating system; standard library only.

Owns the exception for bad input, exit codes, the parser and its checked option types, logging, progress lines, output
files that appear only when they are complete, signals, and what processes share: memory, GPUs of a node, and their end.
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import io
import logging
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional, TypeVar, Union

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 85  # by a signal, with a checkpoint: start again to resume
SIGNAL_EXIT_BASE = 128  # to which a shell adds the number of the signal that ended a program

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # for the main process to answer
SAME_REQUEST_SECONDS = 5.0  # a signal that comes again so soon is the same one: Slurm and scripts send it twice
SHARED_MEMORY_FOLDER = "/dev/shm"
NO_DISK_SPACE = re.compile("No space left|quota exceeded|file too large", re.IGNORECASE)
NO_MEMORY = re.compile("out.of.memory|ALLOC_FAILED|RESOURCE_EXHAUSTED|failed to allocate", re.IGNORECASE)
CLEAR_LINE = "\r\x1b[K"  # of a terminal
SHORT_NAME_BYTES, SHORT_NAME_CHARACTERS = 200, 40  # of a file name that is left as it is, of one that is cut

PathLike = Union[str, "os.PathLike[str]"]
Number = TypeVar("Number", int, float)
NumberType = Callable[[str], Number]


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was expected, found, where, and what to do."""


def run_script(work: Callable[["StopRequest"], Optional[int]]) -> int:
    """Call `work` and turn its end into an exit code; bad input becomes one line instead of a traceback.

    Returns
    -------
    int
        What `work` returned (0 for None), `EXIT_BAD_INPUT` after bad input, and 128 + its number after a signal that
        asks to stop, such as Ctrl-C.
    """
    with StopRequest() as stop:
        try:
            return work(stop) or 0
        except (InputError, OSError, KeyboardInterrupt) as error:
            if stop.signal is not None:  # all else is a consequence: signals reach child processes as well
                logging.error("interrupted; nothing half-written was left behind")
                return SIGNAL_EXIT_BASE + stop.signal
            logging.error("%s", describe_error(error))
            return EXIT_BAD_INPUT
        finally:
            abandon_unread_output()


def abandon_unread_output() -> None:
    """Discard output that cannot be written (a closed pipe, a full disk): Python would complain of it as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: BaseException) -> str:
    """Return one line for the user about an error."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}; check path and disk"
    return str(error)


def configure_logging(level: int = logging.INFO) -> None:
    """Send the program's own log to standard output; `main` functions call it, nothing else does."""
    logging.raiseExceptions = False  # the work continues if its log cannot be written: a full disk, a closed pipe
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # TensorFlow's C++ side: warnings and errors, no chatter
    for name in ("absl", "matplotlib", "tensorflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A log line takes the place of the progress line that may stand in a terminal.
    start = CLEAR_LINE if sys.stdout.isatty() else ""
    if isinstance(sys.stdout, io.TextIOWrapper):  # no line is lost in a locale of few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter(start))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class LogFormatter(logging.Formatter):
    """Writes each message in one readable line, whatever the names of files contain."""

    def __init__(self, start: str = "") -> None:
        super().__init__(f"{start}%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    """Return text with a backslash escape for each line end, tab, other control character and byte that is no UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def log_settings(args: argparse.Namespace) -> None:
    """Log every option with its value, so that a log says how it was made."""
    logging.info("settings: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


# ---------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults, and which reports a mistake in one line instead of a page of usage."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, with the option that was meant if a word is close to one, and exit."""
        meant = [name for word in message.split() for name in self._options_near(word)]
        suggestion = f"; did you mean {' or '.join(meant)}?" if meant else ""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}{suggestion} (-h lists all options)\n")

    def _options_near(self, word: str) -> list[str]:
        known = self._option_string_actions
        name = word.partition("=")[0].rstrip(":,")  # as argparse writes it in a sentence
        return difflib.get_close_matches(name, known, 1) if name.startswith("--") and name not in known else []


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help if action.default is None else super()._get_help_string(action)


def add_flag(group: Any, name: str, default: int, text: str) -> None:
    """Add an option that takes 0 or 1 to an argument group."""
    group.add_argument(name, metavar=name[2:].upper(), type=flag, default=default, help=text)


def number_type(
    convert: Callable[[str], Number], accept: Callable[[Number], bool], expected: str
) -> NumberType[Number]:
    """Return the ``type`` of options that take a number; `expected` says in words which numbers are accepted."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_int = number_type(int, lambda value: value >= 1, "a whole number of at least 1")
positive_float = number_type(float, lambda value: 0 < value < math.inf, "a number above 0, such as 3e-4")
real_number = number_type(float, lambda value: not math.isnan(value), "a number, such as -9999")
flag = number_type(int, lambda value: value in (0, 1), "0 or 1")
seed_int = number_type(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")


def existing_folder(text: str) -> Path:
    """Return `text` as the path of a folder that exists; the ``type`` of command-line options."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}; check the path")
    return path


# ---------------------------------------------------------------------------------------------- progress


class Progress:
    """A progress line: rewritten in place on a terminal, a plain log line now and then in a file.

    Parameters
    ----------
    label : str
        What is being done, such as ``"epoch 3"``.
    total : int
        Number of units of work.
    unit : str
        Their name in the plural, such as ``"images"``.
    rate_factor : float
        Units of `rate_unit` for each unit of work, for rates such as images/s if work is counted in steps.
    rate_unit : str, optional
        Name of what the rate counts; `unit` by default.
    first : int
        Units that were done before, by an earlier run.
    """

    TERMINAL_SECONDS = 0.5
    FILE_SECONDS = 30.0

    def __init__(
        self, label: str, total: int, unit: str, rate_factor: float = 1.0, rate_unit: str = "", first: int = 0
    ) -> None:
        self._label, self._total, self._unit, self._first = printable(label), total, unit, first
        self._rate_factor, self._rate_unit = rate_factor, rate_unit or unit
        self._terminal = sys.stdout.isatty()
        self._interval = self.TERMINAL_SECONDS if self._terminal else self.FILE_SECONDS
        self._start = self._shown = time.monotonic()

    def update(self, done: int, details: str = "") -> None:
        """Show that `done` of the total are finished, if it is time for a line."""
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = format_seconds((self._total - done) / max(rate, 1e-9)) if rate else "unknown"
        line = (
            f"{self._label} {done}/{self._total}{self._unit and ' ' + self._unit} {details + ' ' if details else ''}"
            f"{rate * self._rate_factor:.1f} {self._rate_unit}/s, {left} left"
        )
        if self._terminal:
            sys.stdout.write(f"{CLEAR_LINE}{line[: shutil.get_terminal_size().columns - 1]}")
            sys.stdout.flush()
        else:
            logging.info("%s", line)

    def close(self) -> None:
        """Clear the terminal's line, so that the next log line starts in an empty one."""
        if self._terminal:
            sys.stdout.write(CLEAR_LINE)
            sys.stdout.flush()


def format_seconds(seconds: float) -> str:
    """Return a duration as ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


# ---------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`; the file there takes its place if the block ends well, or else goes.

    Whoever opens `target` finds the old file or the new one, and either of them complete, also after a power failure.
    """
    temporary = target.with_name(f".{shortened(target.stem)}.part{target.suffix}")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def shortened(stem: str) -> str:
    """Return a name with room for an addition within the 255 bytes that file systems allow."""
    if len(os.fsencode(stem)) <= SHORT_NAME_BYTES:
        return stem
    return f"{stem[:SHORT_NAME_CHARACTERS]}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}"


@contextlib.contextmanager
def without_patterns(folder: PathLike) -> Iterator[str]:
    """Yield a path to a folder without brackets and backslashes, which TensorFlow takes for patterns when it reads."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def flush_to_disk(path: PathLike) -> None:
    """Wait until a file, or what was renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- signals


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Answers `STOP_SIGNALS` in its context: the first asks the work to stop, a second ends the process at once.

    The work is stopped by a KeyboardInterrupt, or by its own looking at the request once it has set `is_polled`. Python
    calls handlers in the main thread, which TensorFlow may keep for as long as a step hangs. So a thread sees to the
    second signal. SIGHUP, of a terminal that closes, is left alone if nohup has it ignored.

    Attributes
    ----------
    signal : signal.Signals or None
        The first that came.
    is_polled : bool
        Whether the work looks at the request by itself.
    """

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None
        self.is_polled = False
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Take over the signals."""
        self._pipe, self._pipe_end = os.pipe()
        os.set_blocking(self._pipe_end, False)
        self._pipe_before = signal.set_wakeup_fd(self._pipe_end, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, daemon=True, name="signals").start()
        self.watch()
        return self

    def watch(self) -> None:
        """Take over the signals; again, if a library may have taken them in the meantime."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers_before.setdefault(number, signal.signal(number, self._interrupt))

    def _interrupt(self, number: int, frame: Any) -> None:
        """Stop the work; in the main thread, whenever that has time for it."""
        is_first, self.signal = self.signal is None, self.signal or signal.Signals(number)
        if is_first and not self.is_polled:
            raise KeyboardInterrupt

    def _answer(self) -> None:
        """Take note of the signals as they come; the main function of the thread."""
        since = None
        while numbers := os.read(self._pipe, 1):
            number, now = numbers[0], time.monotonic()
            if number not in STOP_SIGNALS:
                continue
            if since is None:
                since = now
                if self.is_polled:
                    os.write(2, b"\nfinishing the step in hand, then saving; the same once more ends at once\n")
            elif number == signal.SIGINT or now - since > SAME_REQUEST_SECONDS:
                os._exit(SIGNAL_EXIT_BASE + number)  # child processes notice, and end as well
        os.close(self._pipe)

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __exit__(self, *exception: object) -> None:
        """Give back the signals."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe_end)  # which ends the thread


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back `STOP_SIGNALS` while child processes are started, which inherit that until they let them through.

    Also while shared memory is made or removed: what exists and what is known to exist have to change together.
    Slurm and the terminal signal every process at once. A worker ignores them, but not before Python has started in it;
    the process that multiprocessing cleans up with would be ended by SIGUSR1.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # lets some of the signals through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------------------- processes


def tasks_of_nodes(environment: Mapping[str, str]) -> list[int]:
    """Return how many tasks of this ``srun`` each of its nodes has."""
    counts: list[int] = []  # from such as "2(x3),1"
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(repeated or 1)
    return counts


def gpus_of_task(visible: int, environment: Mapping[str, str], may_share: bool) -> Sequence[int]:
    """Return which of the visible GPUs belong to this task of an ``srun``.

    Slurm binds GPUs to tasks only if it is asked to; then a task sees fewer of them than the job has on the node.

    Raises
    ------
    InputError
        If there are fewer GPUs than tasks, and these must not share one.
    """
    is_bound = visible < int(environment.get("SLURM_GPUS_ON_NODE", visible))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or is_bound or not visible:
        return range(visible)
    tasks, task = tasks_of_nodes(environment)[int(environment["SLURM_NODEID"])], int(environment["SLURM_LOCALID"])
    if visible < tasks and not may_share:
        raise InputError(
            f"expected a GPU for each of the {tasks} tasks on this node, found {visible}; lower --ntasks-per-node"
        )
    if visible < tasks:
        return [task % visible]
    return range(task * visible // tasks, (task + 1) * visible // tasks)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means want of memory, in the words of TensorFlow, cuDNN, cuBLAS or the CUDA driver."""
    if NO_DISK_SPACE.search(str(error)):  # a full disk is an exhausted resource to TensorFlow, too
        return False
    return type(error).__name__ in ("ResourceExhaustedError", "MemoryError") or bool(NO_MEMORY.search(str(error)))


def end_with_parent() -> None:
    """Have this process end as soon as its parent is gone, for whatever reason."""
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def allocate_shared_memory(size: int) -> shared_memory.SharedMemory:
    """Create shared memory of `size` bytes and reserve every page of it.

    Without the reservation a file system that is too small would answer later, with a bus error.

    Raises
    ------
    OSError
        If ``/dev/shm`` cannot hold it.
    """
    # Asked for before reserving: a /dev/shm as large as the memory would hand out all of it before it says no.
    if size > free_shared_memory():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), SHARED_MEMORY_FOLDER)
    name = f"psm_{secrets.token_hex(8)}"
    path = f"{SHARED_MEMORY_FOLDER}/{name}"
    # The process that cleans up knows of it before it exists, so that whoever is killed at any moment leaves nothing.
    resource_tracker.register(f"/{name}", "shared_memory")
    try:
        memory = shared_memory.SharedMemory(name, create=True, size=size)
        if os.path.exists(path):  # Linux; elsewhere there is no file to reserve
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        # SharedMemory may have crossed it off already, and what is not on the list cannot be.
        resource_tracker.register(f"/{name}", "shared_memory")
        resource_tracker.unregister(f"/{name}", "shared_memory")
        raise
    return memory


def free_shared_memory() -> float:
    """Return the bytes free in the file system of shared memory; infinity if there is none to ask."""
    try:
        status = os.statvfs(SHARED_MEMORY_FOLDER)
    except OSError:
        return float("inf")
    return status.f_bavail * status.f_frsize


def free_host_memory() -> int:
    """Return the bytes of memory that this process can still have, of the computer and of its job."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return min([available, *free_in_control_groups()])


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
