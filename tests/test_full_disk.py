"""Run each script on a disk that is full from the n-th write on, for every n. Expect one error line and no damage."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from conftest import ROOT, WITHOUT_GPU, ScriptServer, build, errors_of, make_pair, write_tiff
from test_inference_unet import save_random_model
from test_interruptions import SHORT, assert_same_end
from test_train_unet import arguments

TRAINING = ROOT / "train_unet.py"


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    """Return the path of the library that makes write calls fail."""
    library = tmp_path_factory.mktemp("library") / "full_disk.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, ROOT / "tests" / "full_disk.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def server(full_disk):
    """Return a server of scripts whose write calls can be made to fail."""
    server = ScriptServer({"LD_PRELOAD": str(full_disk)})
    yield server
    server.close()


def calls_of(log):
    """Return the name and the file of each call that takes disk space."""
    return [tuple(line.split(" ", 2)[1:]) for line in log.read_text().splitlines()] if log.exists() else []


def variables(folder, log, at):
    log.unlink(missing_ok=True)
    return {"FULL_DISK_FOLDER": str(folder), "FULL_DISK_LOG": str(log), "FULL_DISK_AT": str(at)}


def assert_one_line(output, code):
    """Assert that a run succeeded, even if it could not write its log, or that it reported the full disk."""
    assert code in (0, 1, 2) and "Traceback" not in output, output
    errors = [line for line in errors_of(output) if "No space left on device" in line]
    assert bool(errors) == bool(code), output


def contents_of(folder):
    """Return the contents of the files in a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_first", [True, False])
def test_a_build_is_complete_or_has_not_happened(full_disk, tmp_path, is_first):
    """A build that fails keeps an older pair of databases."""
    build(tmp_path, count=4)
    expected, log, folder = contents_of(tmp_path / "db"), tmp_path / "log", tmp_path / "full"
    before = {} if is_first else contents_of(build(tmp_path / "before", count=4, shape=(32, 32, 1))[0].parent)
    command = [sys.executable, ROOT / "build_lmdb.py", "--image_folder", tmp_path / "images",
               "--mask_folder", tmp_path / "masks", "--output_folder", folder, "--dataset_name", "t"]  # fmt: skip
    at, failed = 0, True
    while failed:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)
        environment = {**WITHOUT_GPU, "LD_PRELOAD": str(full_disk), **variables(folder, log, at)}
        done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        failed = len(calls_of(log)) >= at
        assert_one_line(done.stdout, done.returncode)
        found = contents_of(folder)
        was_late = ("fsync", str(folder)) in calls_of(log)[:at]  # later calls only read the result
        assert found == (before if done.returncode and not was_late else expected), (at, calls_of(log)[at - 1 :])
    assert at > 15 and done.returncode == 0
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert contents_of(folder) == expected


def test_a_mask_is_complete_or_not_there(server, tmp_path):
    save_random_model(tmp_path / "model", 1, 2)
    images, log, folder = tmp_path / "images", tmp_path / "log", tmp_path / "full"
    images.mkdir()
    write_tiff(images / "cell.tif", make_pair(0, (64, 64, 1))[0])
    options = ["--saved_model_filepath", tmp_path / "model", "--image_folder", images, "--output_folder", folder,
               "--save_overlay", 1, "--save_probabilities", 1]  # fmt: skip
    command = [str(ROOT / "inference_unet.py"), *map(str, options)]
    at, failed, expected = 0, True, None
    while failed:
        shutil.rmtree(folder, ignore_errors=True)
        done = server.run(command, **variables(folder, log, at or 10**6))
        failed = at == 0 or len(calls_of(log)) >= at
        assert_one_line(done.stdout, done.returncode)
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert not [name for name in files if "part" in name or "lock" in name]
        found = {
            name: path.read_bytes() if path.suffix == ".png" else tifffile.imread(path) for name, path in files.items()
        }
        expected = expected or found
        for name, content in found.items():
            np.testing.assert_array_equal(content, expected[name])
        assert len(found) == 3 or done.returncode
        at += 1
    assert at > 20 and done.returncode == 0


@pytest.mark.timeout(1200)
def test_a_training_ends_like_an_undisturbed_one_whatever_could_not_be_written(server, databases, tmp_path):
    """Try some kinds of calls and files, because each takes two runs. Set FULL_DISK_STRIDE to 1 to try all."""
    log, folder, expected = tmp_path / "log", tmp_path / "full", tmp_path / "expected"
    command = [str(TRAINING), *map(str, arguments(databases, folder, *SHORT))]
    undisturbed = [str(TRAINING), *map(str, arguments(databases, expected, *SHORT))]
    assert server.run(undisturbed, **variables(expected, log, 10**6)).returncode == 0
    first_of_kind = {}
    for number, (name, path) in enumerate(calls_of(log), 1):
        first_of_kind.setdefault((name, kind_of(path)), number)
    assert len(first_of_kind) > 30
    for at in list(first_of_kind.values())[:: int(os.environ.get("FULL_DISK_STRIDE", 8))]:
        shutil.rmtree(folder, ignore_errors=True)
        done = server.run(command, **variables(folder, log, at))
        assert_one_line(done.stdout, done.returncode)
        left = [str(path) for path in folder.rglob("*") if ".part" in path.name or path.name == ".lock"]
        assert not left, (at, left, done.stdout)
        again = server.run(command, **variables(folder, log, 10**6))
        assert again.returncode == 0, (at, done.stdout, again.stdout)
        assert_same_end(folder, expected)
        json.loads((folder / "saved_model" / "unet_metadata.json").read_text())


def kind_of(path):
    """Return a path without the random part of temporary names and the numbers of event files."""
    return re.sub(r"[0-9a-f]{8}\.part|\d{6,}\S*|_temp\w*", "*", os.path.relpath(path, "/"))
