"""Helpers that build small data sets and run the scripts as a user does."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
FILES_BEFORE = pytest.StashKey[set]()
sys.path.insert(0, str(ROOT))
# A shell makes background jobs ignore SIGINT, and nohup makes them ignore SIGHUP. Processes that the tests start would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# These variables would hide problems: output that is still in a buffer, and compiled files that are left behind.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}


def z_score(image, floor=1.0):
    """Return an image (H, W, C) as the network should see it, computed in float64 from the image alone."""
    mean, deviation = statistics_of(image)
    return ((image - mean) / np.maximum(deviation, floor)).astype(np.float32)


def statistics_of(image):
    """Return the mean and standard deviation of each channel of an image (H, W, C)."""
    return image.mean((0, 1), np.float64), image.std((0, 1), np.float64)


def record_of(image, mask, **origin):
    """Return the record of a complete image."""
    from lmdb_utils import Record

    return Record.encode(image, mask, *statistics_of(image), **origin)


def run_script(name, *arguments, timeout=300, python=None):
    """Run a script of the suite and return its finished process, with standard output and error in ``stdout``.

    Scripts that need TensorFlow run in `script_server`, unless another Python is given.
    """
    command = [str(ROOT / name), *map(str, arguments)]
    if python is None and name != "build_lmdb.py":
        return script_server(name).run(command, timeout)
    return subprocess.run(
        [python or sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=WITHOUT_GPU,
    )


class ScriptServer:
    """Client of script_server.py, which it starts with additional environment variables."""

    def __init__(self, variables=()):
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("script_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # The scripts set this before they load TensorFlow.
            env={**WITHOUT_GPU, "TF_CPP_MIN_LOG_LEVEL": "1", **dict(variables)},
        )

    def run(self, command, timeout=300, **variables):
        """Run a script with its arguments, and kill it after `timeout` seconds."""
        with tempfile.NamedTemporaryFile("r") as output:
            print(json.dumps([command[0], command[1:], output.name, variables]), file=self._process.stdin, flush=True)
            end = threading.Timer(timeout, os.kill, (int(self._process.stdout.readline()), signal.SIGKILL))
            end.start()
            try:
                code = int(self._process.stdout.readline())
            finally:
                end.cancel()
            return subprocess.CompletedProcess(command, code, output.read())

    def close(self):
        """Stop the server."""
        self._process.communicate()


SERVERS = {}


def script_server(script="inference_unet.py"):
    """Return the server that this test process uses for a script; it stops at the end of the session."""
    variables = {"TF_ENABLE_ONEDNN_OPTS": "1"} if script == "train_unet.py" else {}  # that script sets it too
    if script not in SERVERS:
        SERVERS[script] = ScriptServer(variables)
    return SERVERS[script]


def errors_of(output):
    """Return the lines of a log that report errors, without TensorFlow's own."""
    return [line for line in output.splitlines() if re.match(r"[-0-9]+ [:,0-9]+ ERROR ", line)]


def readme_commands():
    """Return the commands of the README, in order, each in one line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in re.sub(r" \\\n +", " ", block).splitlines()]


def make_pair(seed, shape=(64, 64, 1), dtype="uint16", classes=2):
    """Return a random image (H, W, C) with smooth blobs, and a mask (H, W) that follows them."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.standard_normal(shape[:2]), 5, mode="wrap")
    ranks = blobs.ravel().argsort().argsort().reshape(blobs.shape)
    mask = (ranks * classes // ranks.size).astype(np.uint8)
    image = 60 + 60 * mask[..., None] + rng.normal(0, 8, shape)
    return image.astype(dtype), mask


def write_tiff(path, image):
    """Write an image (H, W, C) as a TIFF with interleaved channels."""
    layout = {"planarconfig": "contig"} if image.shape[2] > 1 else {}
    tifffile.imwrite(path, np.squeeze(image), photometric="minisblack", **layout)


CHANNELS_FIRST = {"metadata": {"axes": "CYX"}}
# Ways to store an image with several channels, as options of tifffile.
STORED = {
    "contiguous": {},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "uncompressed tiles": {"tile": (32, 48)},
    "LZW tiles": {"tile": (32, 48), "compression": "lzw"},
    "planar tiles": {"tile": (32, 48), "compression": "zstd", "planarconfig": "separate", "photometric": "rgb"},
    "planar": {"planarconfig": "separate", "photometric": "rgb"},
    "big-endian BigTIFF": {"bigtiff": True, "byteorder": ">"},
    "big-endian strips": {"byteorder": ">", "rowsperstrip": 10, "compression": "zlib"},
    "predictor": {"rowsperstrip": 20, "compression": "zlib", "predictor": True},
    "ImageJ": {"imagej": True, **CHANNELS_FIRST},
    "OME": {"ome": True, "compression": "zlib", "rowsperstrip": 16, **CHANNELS_FIRST},
    "one compressed strip": {"compression": "zlib", "rowsperstrip": 1000},
}


def write_stored(path, image, kind):
    """Write an image (H, W, C) in one of the ways that `STORED` lists."""
    options = {"photometric": "minisblack", **STORED[kind]}
    channels_first = "metadata" in options or options.get("planarconfig") == "separate"
    if not channels_first:
        options["planarconfig"] = "contig"
    if options.get("imagej"):
        del options["photometric"]
    tifffile.imwrite(path, np.moveaxis(image, 2, 0) if channels_first else image, **options)


def write_folders(folder, count=6, shape=(64, 64, 1), **options):
    """Write `count` pairs of TIFFs below `folder`; return the image folder and the mask folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = make_pair(index, shape, **options)
        write_tiff(folder / "images" / f"cell{index}.tif", image)
        tifffile.imwrite(folder / "masks" / f"cell{index}.tif", mask)
    return folder / "images", folder / "masks"


def build(folder, *arguments, train=None, **options):
    """Write folders, build databases called "t" from them, and return the paths of the train and test databases."""
    images, masks = write_folders(folder, **options)
    done = run_script(
        "build_lmdb.py", "--image_folder", images, "--mask_folder", masks, "--output_folder", folder / "db",
        "--dataset_name", "t", *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "db" / "train-t.lmdb", folder / "db" / "test-t.lmdb"


@pytest.fixture(scope="session")
def databases(tmp_path_factory):
    """Return databases of 16 training and 5 test images, 64 x 64 uint16 with two classes."""
    return build(tmp_path_factory.mktemp("databases"), "--train_fraction", "0.77", count=21)


@pytest.fixture
def disk_log(monkeypatch):
    """Return a list that records each flush to disk and each rename, with its path, in order."""
    log, fsync, rename = [], os.fsync, os.rename

    def logged_fsync(descriptor):
        log.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def logged_rename(source, target, *arguments, **options):
        log.append(("rename", Path(target)))
        rename(source, target, *arguments, **options)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_rename)
    monkeypatch.setattr(os, "rename", logged_rename)
    return log


def shared_memory_of(pid):
    """Return the unnamed shared memory that a process has mapped for the batches of its readers."""
    return set(re.findall(r"/dev/shm/#\d+ \(deleted\)", Path(f"/proc/{pid}/maps").read_text()))


LONG_FILES = ("test_slurm.py", "test_interruptions.py", "test_full_disk.py")
# When these start first, two processes finish at about the same time.
FIRST_FILES = (
    *LONG_FILES, "test_train_unet.py", "test_unet_model.py", "test_inference_unet.py", "test_foreign_state.py",
    "test_readme.py", "test_benchmarks.py", "test_shared_folders.py",
)  # fmt: skip


def pytest_addoption(parser):
    """Add the option that runs all tests."""
    parser.addoption("--all", action="store_true", help=f"run {' and '.join(LONG_FILES)} as well, which take long")


def pytest_collection_modifyitems(config, items):
    """Skip the files that take long unless they are requested, and put the files in order."""
    for item in items:
        if item.path.name in LONG_FILES and not config.getoption("all"):
            item.add_marker(pytest.mark.skip(reason="slow; --all runs it"))
    order = {name: place for place, name in enumerate(FIRST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ


def leftovers():
    """Return files in shared memory that Python may have created, except those that other programs use."""
    found = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "tmp"))}
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter() if found else ():
        with contextlib.suppress(OSError):  # it has just exited, or belongs to another user
            used = set(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{process.pid}/maps").read_text()))
            found -= used if process.pid not in ours else set()
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves a file in shared memory; with several processes, check at the end of the session."""
    before = leftovers()
    yield
    deadline = time.monotonic() + 5  # other processes remove the files of a dead one
    while not IS_ONE_OF_SEVERAL and leftovers() - before:
        assert time.monotonic() < deadline, leftovers() - before
        time.sleep(0.1)


def pytest_sessionstart(session):
    """Record what is in shared memory before the tests."""
    session.config.stash[FILES_BEFORE] = leftovers()


def pytest_sessionfinish(session):
    """Fail a session of several processes that leaves a file in shared memory; with ``-n 0``, the test itself fails."""
    for server in SERVERS.values():
        server.close()
    left = leftovers() - session.config.stash[FILES_BEFORE]
    if left and not IS_ONE_OF_SEVERAL:
        print(f"\nleft in /dev/shm: {', '.join(sorted(left))}; run with -n 0 to find out which test does that")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
