"""The interface between a script, its user and the operating system; standard library only.

Provides the guard around a script's work, the exception for bad input, causes of errors, exit codes, the parser and its
checked option types, logging, progress lines, output that appears only when it is complete, claims on work in a shared
folder, and signals. It also manages what processes share: memory, the GPUs of a node, and their lifetime.
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
EXIT_STOPPED = 85  # stopped by a signal after saving a checkpoint; start again to resume
SIGNAL_EXIT_BASE = 128  # a shell adds the number of the signal that ended a program

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # handled by the main process
SAME_REQUEST_SECONDS = 5.0  # a repeat within this time is the same request; Slurm and scripts send it twice
SHARED_MEMORY_FOLDER = "/dev/shm"
NO_DISK_SPACE = re.compile("No space left|quota exceeded|file too large", re.IGNORECASE)
NO_MEMORY = re.compile("out.of.memory|ALLOC_FAILED|RESOURCE_EXHAUSTED|failed to allocate", re.IGNORECASE)
CLEAR_LINE = "\r\x1b[K"  # on a terminal
SHORT_NAME_BYTES, SHORT_NAME_CHARACTERS = 200, 40  # longest name kept unchanged, start kept of a longer name
TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.part(\.\w+)?", re.DOTALL)
REPLACED_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.old", re.DOTALL)  # a file or folder about to be replaced
LOCK_FILE = ".lock"
MANY_PROCESSES = 1024
LONGEST_MESSAGE = 1000  # characters of an argparse message, which may repeat values of any length
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of mallopt(3)
OWN_FILE_BYTES = 64 * 2**20  # largest JSON or CSV file that the suite writes

# What the user can do about an operating system error.
ADVICE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "delete files, ask for a larger quota, or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another file system",
    errno.EACCES: "ask the owner for permission, or choose another path",
    errno.EPERM: "ask the owner for permission, or choose another path",
    errno.EROFS: "choose a folder on another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs on this computer, or ask its administrator",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ENOMEM: "request more memory from the batch system, close other programs, or use fewer processes",
    errno.EAGAIN: "use fewer processes, or raise their limit (ulimit -u)",
    errno.EIO: "the disk or its connection failed, so try again later, or ask the administrator",
    errno.ESTALE: "the connection to the disk was lost, so try again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "move it away, or choose another path",
    errno.ELOOP: "check the path for a link that leads to itself",
}
# Errors of file systems that do not support an operation.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENOLCK, errno.EBADF}

PathLike = Union[str, "os.PathLike[str]"]
Number = TypeVar("Number", int, float)
NumberType = Callable[[str], Number]


class InputError(ValueError):
    """Unusable input from the user; the message states what was expected, what was found, where, and what to do."""


def run_script(
    build_parser: Callable[[], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace, "StopRequest"], Optional[int]],
    argv: Optional[Sequence[str]],
) -> int:
    """Parse the command line, do the work, and return an exit code; report bad input in one line.

    Returns
    -------
    int
        The return value of `work` (0 for None), `EXIT_BAD_INPUT` after bad input, or 128 plus the signal number after
        a signal that asks to stop, such as Ctrl-C.
    """
    open_standard_streams()
    with StopRequest() as stop:
        try:
            configure_logging()
            return work(build_parser().parse_args(argv), stop) or 0
        except (InputError, OSError, MemoryError, KeyboardInterrupt) as error:
            if stop.signal is not None:  # signals reach child processes, too, so other errors are consequences
                logging.error("interrupted; no incomplete files were left behind")
                return SIGNAL_EXIT_BASE + stop.signal
            logging.error("%s", describe_error(error))
            return EXIT_BAD_INPUT
        finally:
            abandon_unread_output()


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation instead of returning it to the system; needs glibc.

    TensorFlow 2.21 requests the opposite as soon as it reads from a Python generator. On a CPU the system then has to
    find and clear new pages for each large tensor of a training step, which takes a third of the time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the maximum in older glibc versions


def open_standard_streams() -> None:
    """Connect missing standard streams to the null device.

    Otherwise the next file opened, such as a database, would get a stream's number, and libraries would print to it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))


def abandon_unread_output() -> None:
    """Discard output that cannot be written (closed pipe, full disk), so that Python does not complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: BaseException) -> str:
    """Return a description of an error for the user, in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        return f"cannot use {os.fsdecode(error.filename)}: {cause_of(error)}"
    return cause_of(error)


def cause_of(error: BaseException) -> str:
    """Return the cause of an error, by its number if it has one, and what to do about it, in one line.

    LMDB and TensorFlow raise exceptions of their own. Only their text contains the operating system's error.
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
    """Return the number of an operating system error, or None for any other error."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in ADVICE if os.strerror(number) in str(error)), None)


def survive(work: Callable[[], None], otherwise: str) -> None:
    """Try some work in a child process first, because LMDB may crash on a damaged file; needs a single thread.

    Raises
    ------
    InputError
        With the text `otherwise`, if a signal kills the child. Exceptions in the child are ignored, because they recur
        when the caller does the work.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about the signal thread, whose locks the child does not use
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the failed assertion that LMDB prints
            work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise InputError(otherwise)


def configure_logging(level: int = logging.INFO) -> None:
    """Send the program's log to standard output; for main programs only, never for library code."""
    logging.raiseExceptions = False  # work continues if the log cannot be written (full disk, closed pipe)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # only warnings and errors from TensorFlow's C++ code
    shield_keras()
    for name, least in (("absl", logging.WARNING), ("matplotlib", logging.ERROR), ("tensorflow", logging.WARNING)):
        logging.getLogger(name).setLevel(least)
    # On a terminal, a log line replaces the current progress line.
    start = CLEAR_LINE if sys.stdout.isatty() else ""
    if isinstance(sys.stdout, io.TextIOWrapper):  # keeps lines that the locale cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter(start))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def shield_keras() -> None:
    """Use Keras as TensorFlow ships it, whatever other projects configured; call before importing TensorFlow."""
    os.environ.update(KERAS_BACKEND="tensorflow", KERAS_HOME=os.devnull)  # contains no keras.json
    os.environ.pop("TF_USE_LEGACY_KERAS", None)


class LogFormatter(logging.Formatter):
    """Writes each message as one readable line, whatever characters file names contain."""

    def __init__(self, start: str = "") -> None:
        super().__init__(f"{start}%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    """Return text with backslash escapes for line ends, tabs, other control characters and bytes that are not UTF-8."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def log_settings(args: argparse.Namespace) -> None:
    """Log every option with its value, so that the log documents the run."""
    logging.info("settings: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))


# ---------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults in its help and reports a mistake in one line instead of a page of usage."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print the error, suggest the option that was probably meant, and exit."""
        meant = [name for word in message.split() for name in self._options_near(word)]
        suggestion = f"; did you mean {' or '.join(meant)}?" if meant and "could match" not in message else ""
        if "expected one argument" in message:
            suggestion += "; write a value that begins with - as --option=VALUE"
        shown = printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {shown}{suggestion} (-h lists all options)\n")

    def _options_near(self, word: str) -> list[str]:
        known = self._option_string_actions
        name = word.partition("=")[0].rstrip(":,")  # argparse adds punctuation in a sentence
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
        """Return the part as it is given on the command line."""
        return f"{self.part}/{self.parts}"


def number_type(
    convert: Callable[[str], Number], accept: Callable[[Number], bool], expected: str
) -> NumberType[Number]:
    """Return the ``type`` of options that take a number; `expected` describes the accepted numbers in words."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def whole_number(low: int, high: int) -> NumberType[int]:
    """Return the ``type`` of options that take a whole number within inclusive bounds."""
    return number_type(int, lambda value: low <= value <= high, f"a whole number from {low} to {high}")


positive_int = whole_number(1, 10**9)
process_count = whole_number(1, MANY_PROCESSES)
real_number = number_type(float, lambda value: not math.isnan(value), "a number, such as -9999")
flag = number_type(int, lambda value: value in (0, 1), "0 or 1")
seed_int = whole_number(0, 2**32 - 1)


def some_path(text: str) -> Path:
    """Return `text` as a path and refuse empty text; the ``type`` of command-line options."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got nothing; is a variable in your script empty?")
    return Path(text)


def existing_folder(text: str) -> Path:
    """Return `text` as the path of an existing folder; the ``type`` of command-line options."""
    path = some_path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}; check the path")
    return path


# ---------------------------------------------------------------------------------------------- progress


class Progress:
    """A progress line, rewritten in place on a terminal or logged at intervals to a file.

    Parameters
    ----------
    label : str
        What is being done, such as ``"epoch 3"``.
    total : int
        Number of units of work.
    unit : str
        Plural name of the unit, such as ``"images"``.
    rate_factor : float
        Number of `rate_unit` per unit of work, for example to show images/s if work is counted in steps.
    rate_unit : str, optional
        Unit that the rate counts; `unit` by default.
    first : int
        Number of units that an earlier run has finished.

    Attributes
    ----------
    total : int
        Number of units of work; may be changed.
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
        """Show that `done` units of the total are finished, if it is time for a new line."""
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
        """Clear the progress line on a terminal, so that the next log line starts on an empty line."""
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
    """Yield a temporary name next to `target`; that file replaces `target` on success and is removed on failure.

    A process that opens `target` finds either the old or the new file, always complete, even after a power failure.
    """
    with replacing_together([target]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_together(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Do the same as `replacing` for several files; either all of them are replaced or none."""
    temporaries = [temporary_name(target) for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            flush_to_disk(temporary)
        with signals_postponed():  # a signal between two renames would leave an old and a new file
            rename_together(temporaries, targets)
    finally:
        for temporary in temporaries:
            remove(temporary)


def rename_together(temporaries: Sequence[Path], targets: Sequence[Path]) -> None:
    """Rename temporary files to their targets; leave all targets unchanged if one rename fails."""
    done: list[tuple[Path, Path, bool]] = []
    try:
        for temporary, target in list(zip(temporaries, targets))[:-1]:
            existed = os.path.lexists(target)
            (exchange if existed else os.rename)(temporary, target)
            done.append((temporary, target, existed))
        try:
            os.replace(temporaries[-1], targets[-1])
        except OSError as error:
            error.filename = os.fspath(targets[-1])  # the name that the user knows
            raise
        done.clear()  # the last step succeeded, so nothing is undone
    finally:
        for temporary, target, existed in done:
            if existed:
                exchange(temporary, target)
            else:
                remove(target)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder next to `target` that replaces it on success and is removed on failure, like `replacing`."""
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
    """Swap the names of two files or folders, atomically if the operating system and the file system support it.

    Otherwise `target` is missing for a moment. If the process is killed then, `Claims` restores it.
    """
    here, at_once = -100, 2  # AT_FDCWD and RENAME_EXCHANGE on Linux
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
    """Return a unique name next to `target` that `Claims` recognizes as temporary."""
    return target.with_name(f".{shortened(target.stem)}.{secrets.token_hex(4)}.part{target.suffix}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents; ignore errors."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder, and restore files they were about to replace."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            replaced = REPLACED_NAME.fullmatch(path.name)
            if replaced and not os.path.lexists(folder / replaced[1]):
                os.rename(path, folder / replaced[1])
            elif replaced or TEMPORARY_NAME.fullmatch(path.name):
                remove(path)


class Claims(contextlib.AbstractContextManager["Claims"]):
    """Claims of processes on work in a folder, so that no two do the same work; a context manager.

    A claim is a POSIX lock on a byte of a file in the folder. It ends with its process, however the process ends. A
    process that finds itself alone removes what killed processes left behind. On a file system without locks, all
    claims succeed.

    Parameters
    ----------
    folder : path
        Must exist.
    below : sequence of str
        Subfolders that may also contain leftovers.
    """

    def __init__(self, folder: Path, below: Sequence[str] = ()) -> None:
        self._path, self._folders = folder / LOCK_FILE, [folder, *(folder / name for name in below)]
        self._works = True

    def __enter__(self) -> "Claims":
        """Join the processes that work in the folder."""
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            is_alone = self._lock(0, 0) and self._works
            if self._works and not is_alone:  # waits while another process checks whether it is alone
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
        """Whether the opened lock file still exists; the last process to leave removes it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _lock(self, start: int, length: int) -> bool:
        """Lock bytes of the file (length 0 for all that follow); return whether no other process has locked them."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NOT_SUPPORTED:
                raise
            if self._works:
                logging.info("cannot lock files in %s; do not start a second run there", self._path.parent)
            self._works = False
        return True

    def claim(self, name: str) -> bool:
        """Claim a piece of work; return False if another process has claimed it."""
        return not self._works or self._lock(self._byte_of(name), 1)

    def release(self, name: str) -> None:
        """Release a piece of work."""
        if self._works:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._byte_of(name))

    @staticmethod
    def _byte_of(name: str) -> int:
        """Return the byte that represents a name; byte 0 represents presence in the folder."""
        return 1 + int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big")

    def __exit__(self, *exception: object) -> None:
        """Leave the folder; the last process removes the lock file."""
        with contextlib.suppress(OSError):
            if not self._works or self._lock(0, 0):
                self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def shortened(stem: str) -> str:
    """Return a name that leaves room for an addition within the 255 bytes that file systems allow."""
    if len(os.fsencode(stem)) <= SHORT_NAME_BYTES:
        return stem
    return f"{stem[:SHORT_NAME_CHARACTERS]}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}"


@contextlib.contextmanager
def without_patterns(folder: PathLike) -> Iterator[str]:
    """Yield a path to a folder without brackets and backslashes, which TensorFlow interprets as patterns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def check_kinds(folder: Path, names: Iterable[str]) -> None:
    """Refuse pipes, devices and the like in place of the suite's files and folders, because opening them may block.

    Parameters
    ----------
    folder : path
        Need not exist.
    names : iterable of str
        Name patterns of regular files, or of folders if they end with a slash.

    Raises
    ------
    InputError
        If a path is of another kind; the message names the first one.
    """
    for name in names:
        for path in sorted(folder.glob(name.rstrip("/"))):
            if not (path.is_dir() if name.endswith("/") else path.is_file()):
                kind = "folder" if name.endswith("/") else "regular file"
                raise InputError(f"expected a {kind} at {path}, found something else; move it away")


def flush_to_disk(path: PathLike) -> None:
    """Wait until a file, or the renames in a folder, have reached the disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def read_if_small(path: Path) -> Optional[bytes]:
    """Return the content of a file, or None if it is not a regular file or larger than any that the suite writes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block it
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > OWN_FILE_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed read does not name its file
        raise
    finally:
        os.close(descriptor)


def read_own_bytes(path: Path) -> bytes:
    """Return the content of a file that the suite wrote and that may have been changed since.

    Raises
    ------
    InputError
        If it is not a regular file, or larger than any that the suite writes.
    """
    content = read_if_small(path)
    if content is None:
        raise InputError(f"{path} was not written by this suite; move it away")
    return content


def read_own_file(path: Path) -> str:
    """Return the text of a file that the suite wrote; raise `InputError` as `read_own_bytes`, or if it is not UTF-8."""
    content = read_own_bytes(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); move it away") from error


Check = Callable[[Any], bool]


def whole(low: float = -(2**62), high: float = 2**62) -> Check:
    """Return a check for whole numbers within inclusive bounds."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """Return a check for numbers that fit a float, within inclusive bounds; without bounds, infinity passes, too."""
    return lambda value: (type(value) is float or whole()(value)) and low <= value <= high


def any_text(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def text_in_utf8(value: Any) -> bool:
    """Whether a value is a string that can be written to a file."""
    return any_text(value) and value == value.encode(errors="replace").decode()


def optional(check: Check) -> Check:
    """Return a check for values that may be None."""
    return lambda value: value is None or check(value)


def list_of(check: Check, length: Optional[int] = None) -> Check:
    """Return a check for lists (of a given length, if any) whose values pass another check."""

    def is_such_a_list(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(check, value))

    return is_such_a_list


def check_values(values: Mapping[str, Any], checks: Mapping[str, Check], where: PathLike) -> None:
    """Refuse values from a file of the suite if one is missing or not what the suite writes.

    Raises
    ------
    InputError
        If a value is missing or wrong; the message names the first one and the file, `where`.
    """
    for name, check in checks.items():
        if name not in values or not check(values[name]):
            found = repr(values[name])[:60] if name in values else "nothing"
            raise InputError(f"{os.fspath(where)}: {name} cannot be {found}; was the file changed by hand?")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that the suite wrote; raises errors as `read_own_file` does."""
    try:
        values = json.loads(read_own_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not valid JSON ({cause_of(error)}); move it away") from error
    if not isinstance(values, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(values).__name__}; move it away")
    return values


# ---------------------------------------------------------------------------------------------- signals


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Handles `STOP_SIGNALS` in its context: the first asks the work to stop, the second ends the process at once.

    A KeyboardInterrupt stops the work, unless it has set `is_polled` and checks the request on its own. Python calls
    signal handlers in the main thread, which TensorFlow may block for as long as a step hangs. A separate thread
    therefore handles the second signal. SIGHUP, sent when a terminal closes, stays ignored if nohup ignores it.

    Attributes
    ----------
    signal : signal.Signals or None
        First signal received.
    is_polled : bool
        Whether the work checks the request on its own.
    """

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None
        self.is_polled = False
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the signal handlers."""
        self._pipe, self._pipe_end = os.pipe()
        os.set_blocking(self._pipe_end, False)
        self._pipe_before = signal.set_wakeup_fd(self._pipe_end, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, daemon=True, name="signals").start()
        self.watch()
        return self

    def watch(self) -> None:
        """Install the signal handlers, or install them again if a library may have replaced them."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers_before.setdefault(number, signal.signal(number, self._interrupt))

    def _interrupt(self, number: int, frame: Any) -> None:
        """Stop the work; called in the main thread as soon as it is free."""
        is_first, self.signal = self.signal is None, self.signal or signal.Signals(number)
        if is_first and not self.is_polled:
            raise KeyboardInterrupt

    def _answer(self) -> None:
        """Handle signals as they arrive; the main function of the thread."""
        since = None
        while numbers := os.read(self._pipe, 1):
            number, now = numbers[0], time.monotonic()
            if number not in STOP_SIGNALS:
                continue
            if since is None:
                since = now
                if self.is_polled:
                    os.write(2, b"\nfinishing the current step, then saving; send the signal again to stop at once\n")
            elif number == signal.SIGINT or now - since > SAME_REQUEST_SECONDS:
                os._exit(SIGNAL_EXIT_BASE + number)  # child processes notice and exit, too
        os.close(self._pipe)

    def __bool__(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __exit__(self, *exception: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe_end)  # ends the thread


@contextlib.contextmanager
def signals_postponed() -> Iterator[None]:
    """Postpone `STOP_SIGNALS` until the block is done; for the main thread.

    Blocking them in the main thread is not enough. The system delivers a signal to any thread that does not block it,
    and Python then calls the handler in the main thread anyway.
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
    """Block `STOP_SIGNALS` while child processes start; the children inherit the block until they lift it.

    Slurm and the terminal signal every process at once. A worker ignores the signals, but only after Python has started
    in it. SIGUSR1 would kill the resource tracker of multiprocessing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # unblocks some of the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------------------- processes


def slurm_text(environment: Mapping[str, str], name: str, pattern: str, default: str = "") -> str:
    """Return the value of a Slurm variable, which has to match a pattern.

    Raises
    ------
    InputError
        If it does not match, for example because the environment was copied only in part.
    """
    text = environment.get(name, default)
    if not re.fullmatch(pattern, text):
        raise InputError(
            f"cannot use the Slurm variable {name} with value {text!r}; was only part of a job's environment copied? "
            "Start this script with srun, or unset all variables whose names begin with SLURM_"
        )
    return text


def slurm_number(environment: Mapping[str, str], name: str, default: Optional[int] = None) -> int:
    """Return the number in a Slurm variable, or `default` if it is not set; raises errors as `slurm_text` does."""
    return int(slurm_text(environment, name, r"\d{1,18}", "" if default is None else str(default)))


def tasks_of_nodes(environment: Mapping[str, str]) -> list[int]:
    """Return the number of tasks on each node of this ``srun``; raises errors as `slurm_text` does."""
    text = slurm_text(environment, "SLURM_STEP_TASKS_PER_NODE", r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*")  # such as 2(x3),1
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeated or 1)
    return counts


def gpus_of_task(visible: int, environment: Mapping[str, str], may_share: bool) -> Sequence[int]:
    """Return which of the visible GPUs belong to this task of an ``srun``.

    Slurm binds GPUs to tasks only on request. A task then sees fewer GPUs than the job has on the node.

    Raises
    ------
    InputError
        If there are fewer GPUs than tasks, and tasks must not share a GPU.
    """
    is_bound = visible < slurm_number(environment, "SLURM_GPUS_ON_NODE", visible)
    if slurm_number(environment, "SLURM_STEP_NUM_TASKS", 1) == 1 or is_bound or not visible:
        return range(visible)
    node, task = slurm_number(environment, "SLURM_NODEID"), slurm_number(environment, "SLURM_LOCALID")
    tasks = [*tasks_of_nodes(environment), *[0] * (node + 1)][node]
    if task >= tasks:
        raise InputError(
            f"on node {node} expected a task from 0 to {tasks - 1}, found {task}; start the tasks with srun"
        )
    if visible < tasks and not may_share:
        raise InputError(
            f"expected a GPU for each of the {tasks} tasks on this node, found {visible}; lower --ntasks-per-node"
        )
    if visible < tasks:
        return [task % visible]
    return range(task * visible // tasks, (task + 1) * visible // tasks)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, as worded by TensorFlow, cuDNN, cuBLAS or the CUDA driver."""
    if NO_DISK_SPACE.search(str(error)):  # TensorFlow calls a full disk an exhausted resource, too
        return False
    return type(error).__name__ in ("ResourceExhaustedError", "MemoryError") or bool(NO_MEMORY.search(str(error)))


def end_with_parent() -> None:
    """Make this process exit as soon as its parent has ended, for whatever reason."""
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class SharedMemory:
    """Memory that processes share: a nameless file that disappears with the last of them, however they end.

    Parameters
    ----------
    file : file
        Open file; all of its bytes are shared.

    Attributes
    ----------
    name : str
        Path for other processes of the user, valid while this one has it open; see `attach_shared_memory`.
    size : int
        Size in bytes.
    buf : mmap
        The shared bytes.
    """

    def __init__(self, file: Any) -> None:
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        self.buf = mmap.mmap(file.fileno(), self.size)

    def close(self) -> None:
        """Release the memory; a second call does nothing."""
        self._file.close()
        with contextlib.suppress(BufferError):  # an array still uses it and will free it
            self.buf.close()


def allocate_shared_memory(size: int) -> SharedMemory:
    """Create shared memory of `size` bytes and reserve every page of it.

    Without the reservation, a file system that is too small would cause a bus error later.

    Raises
    ------
    OSError
        If ``/dev/shm`` has too little space.
    """
    # Checked before reserving, because a /dev/shm as large as the memory would hand out all of it before it fails.
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
    """Return the shared memory that another process created."""
    return SharedMemory(open(name, "r+b", buffering=0))


def free_shared_memory() -> float:
    """Return the number of free bytes in the shared-memory file system, or infinity if there is none."""
    try:
        status = os.statvfs(SHARED_MEMORY_FOLDER)
    except OSError:
        return float("inf")
    return status.f_bavail * status.f_frsize


def free_host_memory() -> int:
    """Return the bytes of memory that the computer and the job can still give to this process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return min([available, *free_in_control_groups()])


def free_in_control_groups() -> Iterator[int]:
    """Yield the free bytes under each memory limit that a batch system or container sets for this process."""
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
            for level in (folder, *folder.parents):  # a limit applies to everything below it
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max" for no limit
                    yield int((level / limit).read_text()) - int((level / used).read_text())
