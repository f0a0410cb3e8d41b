"""How a script meets its user and its operating system; standard library only.

Owns the guard around a script's work, the exception for bad input, causes of errors, exit codes, the parser and its
checked option types, logging, progress lines, output that appears only when it is complete, who works on what in a
folder, signals, and what processes share: memory, GPUs of a node, and their end.
"""

import argparse
import contextlib
import ctypes
import difflib
import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import mmap
import multiprocessing
import os
import re
import resource
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn, Optional, TypeVar, Union

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
TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.part(\.\w+)?", re.DOTALL)
REPLACED_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.old", re.DOTALL)  # of a folder that is about to be replaced
LOCK_FILE = ".lock"
MANY_PROCESSES = 1024
LONGEST_MESSAGE = 1000  # characters of what argparse says, which repeats values of any length
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
OWN_FILE_BYTES = 64 * 2**20  # of a JSON or CSV file that the suite wrote itself, at most

# What to do about an error of the operating system.
ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "your quota is used up: delete files, ask for more, or choose another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another file system",
    errno.EACCES: "ask the owner for permission, or choose another path",
    errno.EPERM: "ask the owner for permission, or choose another path",
    errno.EROFS: "choose a folder on another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the computer has too many files open: end other programs, or ask its administrator",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ENOMEM: "ask the batch system for more memory, end other programs, or use fewer processes",
    errno.EAGAIN: "use fewer processes, or raise their limit (ulimit -u)",
    errno.EIO: "the disk or the connection to it fails: try again later, or ask the administrator",
    errno.ESTALE: "the connection to the disk was lost: try again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "move it away, or choose another path",
    errno.ELOOP: "a link leads to itself: check the path",
}
# What a file system answers if it cannot do what was asked for at all.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENOLCK, errno.EBADF}

PathLike = Union[str, "os.PathLike[str]"]
Number = TypeVar("Number", int, float)
NumberType = Callable[[str], Number]


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was expected, found, where, and what to do."""


def run_script(
    build_parser: Callable[[], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace, "StopRequest"], Optional[int]],
    argv: Optional[Sequence[str]],
) -> int:
    """Parse the command line and do the work; turn its end into an exit code, bad input into one line.

    Returns
    -------
    int
        What `work` returned (0 for None), `EXIT_BAD_INPUT` after bad input, and 128 + its number after a signal that
        asks to stop, such as Ctrl-C.
    """
    open_standard_streams()
    with StopRequest() as stop:
        try:
            configure_logging()
            return work(build_parser().parse_args(argv), stop) or 0
        except (InputError, OSError, MemoryError, KeyboardInterrupt) as error:
            if stop.signal is not None:  # all else is a consequence: signals reach child processes as well
                logging.error("interrupted; nothing half-written was left behind")
                return SIGNAL_EXIT_BASE + stop.signal
            logging.error("%s", describe_error(error))
            return EXIT_BAD_INPUT
        finally:
            abandon_unread_output()


def keep_freed_memory() -> None:
    """Have freed memory kept for the next allocation instead of returned to the system; needs glibc.

    TensorFlow 2.21 asks for the opposite as soon as it reads from a Python generator. On a CPU each large tensor of a
    training step then consists of pages that the system has to find and clear first: a third of the time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # an older glibc takes no more than that


def open_standard_streams() -> None:
    """Connect the standard streams that this process was started without to the null device.

    Otherwise the next file that is opened, such as a database, would be what libraries print to.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))


def abandon_unread_output() -> None:
    """Discard output that cannot be written (a closed pipe, a full disk): Python would complain of it as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: BaseException) -> str:
    """Return one line for the user about an error."""
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        return f"cannot use {os.fsdecode(error.filename)}: {cause_of(error)}"
    return cause_of(error)


def cause_of(error: BaseException) -> str:
    """Return what an error is, by its number if it has one, and what to do about it; one line.

    LMDB and TensorFlow have exceptions of their own, of which only the text says what the operating system answered.
    """
    if isinstance(error, InputError):
        return str(error)
    number, text = number_of(error), str(error).strip()
    if number in ADVICE:
        return f"{os.strerror(number)}; {ADVICE[number]}"
    if number is not None:
        return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__


def number_of(error: BaseException) -> Optional[int]:
    """Return the number of an error of the operating system, None if it is none."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in ADVICE if os.strerror(number) in str(error)), None)


def survive(work: Callable[[], None], otherwise: str) -> None:
    """Do something first in a process of its own, because LMDB may crash on a damaged file; needs a single thread.

    Raises
    ------
    InputError
        With the text `otherwise`, if the process is killed by a signal. An exception is left for the caller to meet.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of the thread for signals, whose locks the child does not use
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where LMDB says of which assertion it died
            work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise InputError(otherwise)


def configure_logging(level: int = logging.INFO) -> None:
    """Send the program's own log to standard output; `main` functions call it, nothing else does."""
    logging.raiseExceptions = False  # the work continues if its log cannot be written: a full disk, a closed pipe
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # TensorFlow's C++ side: warnings and errors, no chatter
    shield_keras()
    for name, least in (("absl", logging.WARNING), ("matplotlib", logging.ERROR), ("tensorflow", logging.WARNING)):
        logging.getLogger(name).setLevel(least)
    # A log line takes the place of the progress line that may stand in a terminal.
    start = CLEAR_LINE if sys.stdout.isatty() else ""
    if isinstance(sys.stdout, io.TextIOWrapper):  # no line is lost in a locale of few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter(start))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def shield_keras() -> None:
    """Have Keras as TensorFlow brings it, however other projects have configured it; before TensorFlow is imported."""
    os.environ.update(KERAS_BACKEND="tensorflow", KERAS_HOME=os.devnull)  # where no keras.json is
    os.environ.pop("TF_USE_LEGACY_KERAS", None)


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
        suggestion = f"; did you mean {' or '.join(meant)}?" if meant and "could match" not in message else ""
        if "expected one argument" in message:
            suggestion += "; write a value that begins with - as --option=VALUE"
        shown = printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {shown}{suggestion} (-h lists all options)\n")

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


def file_stem(text: str) -> str:
    """Return `text` if it can be part of a file name; the ``type`` of a command-line option."""
    if not text or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a name without slashes, got {text!r}")
    return text


class Part(NamedTuple):
    """One of several equal parts, counted from 1, such as 2/8; its `parse` is the ``type`` of a command-line option."""

    part: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Return ``"2/8"`` as a part."""
        part, _, parts = text.partition("/")
        if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) or not 1 <= int(part) <= int(parts):
            raise argparse.ArgumentTypeError(f"expected a part and the number of parts, such as 2/8, got {text!r}")
        return cls(int(part), int(parts))

    def __str__(self) -> str:
        """Return the part as it is given."""
        return f"{self.part}/{self.parts}"


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


def whole_number(low: int, high: int) -> NumberType[int]:
    """Return the ``type`` of options that take a whole number within bounds, both included."""
    return number_type(int, lambda value: low <= value <= high, f"a whole number from {low} to {high}")


positive_int = whole_number(1, 10**9)
process_count = whole_number(1, MANY_PROCESSES)
real_number = number_type(float, lambda value: not math.isnan(value), "a number, such as -9999")
flag = number_type(int, lambda value: value in (0, 1), "0 or 1")
seed_int = whole_number(0, 2**32 - 1)


def some_path(text: str) -> Path:
    """Return `text` as a path, which an empty text is not; the ``type`` of command-line options."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got nothing; is a variable of your script empty?")
    return Path(text)


def existing_folder(text: str) -> Path:
    """Return `text` as the path of a folder that exists; the ``type`` of command-line options."""
    path = some_path(text)
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

    Attributes
    ----------
    total : int
        Units of work; may be changed.
    """

    TERMINAL_SECONDS = 0.5
    FILE_SECONDS = 30.0

    def __init__(
        self, label: str, total: int, unit: str, rate_factor: float = 1.0, rate_unit: str = "", first: int = 0
    ) -> None:
        self._label, self.total, self._unit, self._first = printable(label), total, unit, first
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
        left = format_seconds((self.total - done) / max(rate, 1e-9)) if rate else "unknown"
        line = (
            f"{self._label} {done}/{self.total}{self._unit and ' ' + self._unit} {details + ' ' if details else ''}"
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
    with replacing_together([target]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_together(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Do as `replacing` for several files, of which either all are replaced or none."""
    temporaries = [temporary_name(target) for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            flush_to_disk(temporary)
        with signals_postponed():  # one that comes between two renames would leave a file of each kind
            rename_together(temporaries, targets)
    finally:
        for temporary in temporaries:
            remove(temporary)


def rename_together(temporaries: Sequence[Path], targets: Sequence[Path]) -> None:
    """Give files the names of others, or leave all as they are if one cannot be renamed."""
    done: list[tuple[Path, Path, bool]] = []
    try:
        for temporary, target in list(zip(temporaries, targets))[:-1]:
            existed = os.path.lexists(target)
            (exchange if existed else os.rename)(temporary, target)
            done.append((temporary, target, existed))
        try:
            os.replace(temporaries[-1], targets[-1])
        except OSError as error:
            error.filename = os.fspath(targets[-1])  # what the user knows
            raise
        done.clear()  # this was the last step, which nothing takes back
    finally:
        for temporary, target, existed in done:
            if existed:
                exchange(temporary, target)
            else:
                remove(target)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its place if the block ends well, or else goes; as `replacing`."""
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            flush_to_disk(path)
        if os.path.lexists(target):
            exchange(temporary, target)
        else:
            os.rename(temporary, target)
        flush_to_disk(target.parent)
    finally:
        remove(temporary)


def exchange(new: Path, target: Path) -> None:
    """Have two files or folders change their names; at once, if the operating system and the file system can do that.

    Otherwise `target` is missing for a moment; if the process is killed then, `Claims` brings it back.
    """
    here, at_once = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if not rename(here, os.fsencode(new), here, os.fsencode(target), at_once):
            return
        number = ctypes.get_errno()
        if number not in NOT_SUPPORTED:
            raise OSError(number, os.strerror(number), os.fspath(target))
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, new)


def temporary_name(target: Path) -> Path:
    """Return a name beside `target` that nobody else has, and that `Claims` knows as one of its kind."""
    return target.with_name(f".{shortened(target.stem)}.{secrets.token_hex(4)}.part{target.suffix}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder, and bring back what they were about to replace."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            replaced = REPLACED_NAME.fullmatch(path.name)
            if replaced and not os.path.lexists(folder / replaced[1]):
                os.rename(path, folder / replaced[1])
            elif replaced or TEMPORARY_NAME.fullmatch(path.name):
                remove(path)


class Claims(contextlib.AbstractContextManager["Claims"]):
    """Which process works on what in a folder, so that no two do the same; a context manager.

    A claim is the POSIX lock of a byte of a file in the folder, and ends with its process, however that ends. A process
    that finds itself alone removes what killed ones left there. On a file system without locks all claims succeed.

    Parameters
    ----------
    folder : path
        Must exist.
    below : sequence of str
        Folders in it that may contain leftovers, too.
    """

    def __init__(self, folder: Path, below: Sequence[str] = ()) -> None:
        self._path, self._folders = folder / LOCK_FILE, [folder, *(folder / name for name in below)]
        self._works = True

    def __enter__(self) -> "Claims":
        """Join those who work in the folder."""
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            is_alone = self._lock(0, 0) and self._works
            if self._works and not is_alone:  # somebody else may be looking whether it is alone, for a moment
                fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)
            if not self._works or self._is_current():
                break
            os.close(self._descriptor)
        if is_alone:
            for folder in self._folders:
                remove_leftovers(folder)
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, 0)
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 0, 1)
        return self

    def _is_current(self) -> bool:
        """Whether the file that was opened is there still; the last one who leaves removes it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _lock(self, start: int, length: int) -> bool:
        """Lock bytes of the file, 0 for all that follow; return whether nobody else has any of them."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NOT_SUPPORTED:
                raise
            if self._works:
                logging.info("no locks in %s: do not start a second run there", self._path.parent)
            self._works = False
        return True

    def claim(self, name: str) -> bool:
        """Take a piece of work; return whether no other process has taken it."""
        return not self._works or self._lock(self._byte_of(name), 1)

    def release(self, name: str) -> None:
        """Give a piece of work back."""
        if self._works:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._byte_of(name))

    @staticmethod
    def _byte_of(name: str) -> int:
        """Return the byte that stands for a name; 0 stands for being there."""
        return 1 + int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big")

    def __exit__(self, *exception: object) -> None:
        """Leave; the last one takes the file along."""
        with contextlib.suppress(OSError):
            if not self._works or self._lock(0, 0):
                self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


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


def check_kinds(folder: Path, names: Iterable[str]) -> None:
    """Refuse pipes, devices and the like where the suite wrote files and folders: whoever opens them may wait forever.

    Parameters
    ----------
    folder : path
        It need not exist.
    names : iterable of str
        Patterns of the names of regular files, and of folders if they end with a slash.

    Raises
    ------
    InputError
        Names the first that is of another kind.
    """
    for name in names:
        for path in sorted(folder.glob(name.rstrip("/"))):
            if not (path.is_dir() if name.endswith("/") else path.is_file()):
                kind = "folder" if name.endswith("/") else "regular file"
                raise InputError(f"expected a {kind} {path}, found something else; move it away")


def flush_to_disk(path: PathLike) -> None:
    """Wait until a file, or what was renamed in a folder, is on the disk, unless its file system cannot say."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def read_if_small(path: Path) -> Optional[bytes]:
    """Return the content of a file; None if it is no regular one, or larger than any of ours."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep it waiting
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > OWN_FILE_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def read_own_file(path: Path) -> str:
    """Return the text of a file that the suite wrote, and that somebody may have changed since.

    Raises
    ------
    InputError
        If it is no regular file, larger than any of ours, or not in UTF-8.
    """
    content = read_if_small(path)
    if content is None:
        raise InputError(f"{path} is not a file of this suite; move it away")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}); move it away") from error


Check = Callable[[Any], bool]


def whole(low: float = -(2**62), high: float = 2**62) -> Check:
    """Return a check for whole numbers within bounds, both included."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """Return a check for numbers within bounds, both included, that a float has; without bounds, for infinity too."""
    return lambda value: (type(value) is float or whole()(value)) and low <= value <= high


def any_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def text_in_utf8(value: Any) -> bool:
    """Whether a value is a text that can be written to a file."""
    return any_text(value) and value == value.encode(errors="replace").decode()


def optional(check: Check) -> Check:
    """Return a check for values that may be None."""
    return lambda value: value is None or check(value)


def list_of(check: Check, length: Optional[int] = None) -> Check:
    """Return a check for lists (of some length) of values that pass another check."""

    def is_such_a_list(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(check, value))

    return is_such_a_list


def check_values(values: Mapping[str, Any], checks: Mapping[str, Check], where: PathLike) -> None:
    """Refuse values from a file that the suite wrote, if one is missing or not of the kind that the suite writes.

    Raises
    ------
    InputError
        Names the first such value, and the file, which is `where`.
    """
    for name, check in checks.items():
        if name not in values or not check(values[name]):
            found = repr(values[name])[:60] if name in values else "nothing"
            raise InputError(f"{os.fspath(where)}: {name} cannot be {found}; was the file changed by hand?")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that the suite wrote; errors as those of `read_own_file`."""
    try:
        values = json.loads(read_own_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON ({cause_of(error)}); move it away") from error
    if not isinstance(values, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(values).__name__}; move it away")
    return values


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
def signals_postponed() -> Iterator[None]:
    """Have `STOP_SIGNALS` take effect when the block is done; for the main thread.

    To block them there would not do: the system gives a signal to any thread that does not block it, and Python then
    calls the handler in the main thread all the same.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOP_SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back `STOP_SIGNALS` while child processes are started, which inherit that until they let them through.

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


def slurm_text(environment: Mapping[str, str], name: str, pattern: str, default: str = "") -> str:
    """Return what a variable that Slurm sets contains, which has to match a pattern.

    Raises
    ------
    InputError
        If it does not, such as in an environment that was copied in part.
    """
    text = environment.get(name, default)
    if not re.fullmatch(pattern, text):
        raise InputError(
            f"cannot use the variable {name} of Slurm, {text!r}; was the environment of a job copied in part? Start "
            "this with srun, or unset the variables whose names begin with SLURM_"
        )
    return text


def slurm_number(environment: Mapping[str, str], name: str, default: Optional[int] = None) -> int:
    """Return the number in a variable that Slurm sets; errors as those of `slurm_text`, unless there is a `default`."""
    return int(slurm_text(environment, name, r"\d{1,18}", "" if default is None else str(default)))


def tasks_of_nodes(environment: Mapping[str, str]) -> list[int]:
    """Return how many tasks of this ``srun`` each of its nodes has; errors as those of `slurm_text`."""
    text = slurm_text(environment, "SLURM_STEP_TASKS_PER_NODE", r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*")  # such as 2(x3),1
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
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
    is_bound = visible < slurm_number(environment, "SLURM_GPUS_ON_NODE", visible)
    if slurm_number(environment, "SLURM_STEP_NUM_TASKS", 1) == 1 or is_bound or not visible:
        return range(visible)
    node, task = slurm_number(environment, "SLURM_NODEID"), slurm_number(environment, "SLURM_LOCALID")
    tasks = [*tasks_of_nodes(environment), *[0] * (node + 1)][node]
    if task >= tasks:
        raise InputError(f"expected a task of this srun on node {node}, 0 to {tasks - 1}, found {task}; use srun")
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


class SharedMemory:
    """Memory that processes share: a file without a name, which goes with the last of them, however they end.

    Parameters
    ----------
    file : file
        Of which all bytes are shared.

    Attributes
    ----------
    name : str
        Where other processes of the user find it, as long as this one has it open; see `attach_shared_memory`.
    size : int
        In bytes.
    buf : mmap
        The bytes.
    """

    def __init__(self, file: Any) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        self.buf = mmap.mmap(file.fileno(), self.size)

    def close(self) -> None:
        """Give it up; does nothing the second time."""
        self._file.close()
        with contextlib.suppress(BufferError):  # an array still looks at it: it goes with that
            self.buf.close()


def allocate_shared_memory(size: int) -> SharedMemory:
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
    file = tempfile.TemporaryFile(dir=SHARED_MEMORY_FOLDER, buffering=0)
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return SharedMemory(file)
    except BaseException:
        file.close()
        raise


def attach_shared_memory(name: str) -> SharedMemory:
    """Return the shared memory that another process has created."""
    return SharedMemory(open(name, "r+b", buffering=0))


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
