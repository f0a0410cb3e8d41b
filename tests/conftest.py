"""Small data sets that tests build, and how they start the scripts as a user does."""

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
# A shell that runs the tests in the background has them ignore Ctrl-C, nohup has them ignore SIGHUP. What they start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# These hide what happens without them: output that waits to be written, and compiled files that are left behind.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}


def z_score(image, floor=1.0):
    """Return an image (H, W, C) as the network has to see it, computed in float64 from the image alone."""
    mean, deviation = statistics_of(image)
    return ((image - mean) / np.maximum(deviation, floor)).astype(np.float32)


def statistics_of(image):
    """Return mean and standard deviation of each channel of an image (H, W, C)."""
    return image.mean((0, 1), np.float64), image.std((0, 1), np.float64)


def record_of(image, mask, **origin):
    """Return the record of an image that is complete."""
    from lmdb_utils import Record

    return Record.encode(image, mask, *statistics_of(image), **origin)


def run_script(name, *arguments, timeout=300, python=None):
    """Run a script of the suite; return its finished process, with standard output and error in ``stdout``.

    Those that need TensorFlow come from `script_server`, unless it is that of another Python.
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
    """The other end of script_server.py, which gets additional environment variables."""

    def __init__(self, variables=()):
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("script_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # As the scripts set it before they load TensorFlow.
            env={**WITHOUT_GPU, "TF_CPP_MIN_LOG_LEVEL": "1", **dict(variables)},
        )

    def run(self, command, timeout=300, **variables):
        """Run a script with its arguments, and end it when it takes longer than `timeout` seconds."""
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
        """End the server."""
        self._process.communicate()


SERVERS = {}


def script_server(script="inference_unet.py"):
    """Return the server of this process of tests for a script, which ends with the session."""
    variables = {"TF_ENABLE_ONEDNN_OPTS": "1"} if script == "train_unet.py" else {}  # as that script sets it
    if script not in SERVERS:
        SERVERS[script] = ScriptServer(variables)
    return SERVERS[script]


def errors_of(output):
    """Return the lines of a log that report errors; TensorFlow's own are not of it."""
    return [line for line in output.splitlines() if re.match(r"[-0-9]+ [:,0-9]+ ERROR ", line)]


def readme_commands():
    """Return the commands of the README, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def make_pair(seed, shape=(64, 64, 1), dtype="uint16", classes=2):
    """Return a random image (H, W, C) with smooth blobs, and a mask (H, W) that follows them."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.standard_normal(shape[:2]), 5, mode="wrap")
    ranks = blobs.ravel().argsort().argsort().reshape(blobs.shape)
    mask = (ranks * classes // ranks.size).astype(np.uint8)
    image = 60 + 60 * mask[..., None] + rng.normal(0, 8, shape)
    return image.astype(dtype), mask


def write_tiff(path, image):
    """Write an image (H, W, C) as a TIFF of interleaved channels."""
    layout = {"planarconfig": "contig"} if image.shape[2] > 1 else {}
    tifffile.imwrite(path, np.squeeze(image), photometric="minisblack", **layout)


CHANNELS_FIRST = {"metadata": {"axes": "CYX"}}
# Ways to store an image of several channels, as options of tifffile.
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
    """Write an image (H, W, C) in one of the ways above."""
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
    """Write folders, build databases called "t" from them, and return the paths of train and test database."""
    images, masks = write_folders(folder, **options)
    done = run_script(
        "build_lmdb.py", "--image_folder", images, "--mask_folder", masks, "--output_folder", folder / "db",
        "--dataset_name", "t", *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "db" / "train-t.lmdb", folder / "db" / "test-t.lmdb"


@pytest.fixture(scope="session")
def databases(tmp_path_factory):
    """Databases of 16 training and 5 test images of 64 x 64 uint16 with two classes."""
    return build(tmp_path_factory.mktemp("databases"), "--train_fraction", "0.77", count=21)


@pytest.fixture
def disk_log(monkeypatch):
    """Return a list that gets each flush to the disk and each rename, with the path, as they happen."""
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
    """Return what shared memory a process has mapped, its readers' batches; none of it has a name."""
    return set(re.findall(r"/dev/shm/#\d+ \(deleted\)", Path(f"/proc/{pid}/maps").read_text()))


LONG_FILES = ("test_slurm.py", "test_interruptions.py", "test_full_disk.py")
# With these begun first, two processes come to an end at about the same time.
FIRST_FILES = (*LONG_FILES, "test_train_unet.py", "test_inference_unet.py", "test_build_lmdb.py", "test_readme.py")


def pytest_addoption(parser):
    """Add the option that runs everything."""
    parser.addoption("--all", action="store_true", help=f"run {' and '.join(LONG_FILES)} too, which take long")


def pytest_collection_modifyitems(config, items):
    """Leave out what takes long unless it is asked for, and put the files in order."""
    for item in items:
        if item.path.name in LONG_FILES and not config.getoption("all"):
            item.add_marker(pytest.mark.skip(reason="takes long: --all runs it"))
    order = {name: place for place, name in enumerate(FIRST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ


def leftovers():
    """Return files in shared memory that Python may have made, but for those that other programs have in use."""
    found = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "tmp"))}
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter() if found else ():
        with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
            used = set(re.findall(r"/dev/shm/(\S+)", Path(f"/proc/{process.pid}/maps").read_text()))
            found -= used if process.pid not in ours else set()
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves a file in shared memory; among several processes the end of the session tells."""
    before = leftovers()
    yield
    deadline = time.monotonic() + 5  # what a dead process held, others remove
    while not IS_ONE_OF_SEVERAL and leftovers() - before:
        assert time.monotonic() < deadline, leftovers() - before
        time.sleep(0.1)


def pytest_sessionstart(session):
    """Remember what was in shared memory before."""
    session.config.stash[FILES_BEFORE] = leftovers()


def pytest_sessionfinish(session):
    """Fail a session of several processes that leaves a file in shared memory; with ``-n 0`` the test fails itself."""
    for server in SERVERS.values():
        server.close()
    left = leftovers() - session.config.stash[FILES_BEFORE]
    if left and not IS_ONE_OF_SEVERAL:
        print(f"\nleft in /dev/shm: {', '.join(sorted(left))}; -n 0 tells which test does that")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
