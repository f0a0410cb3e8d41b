"""Several processes in one folder, killed processes, and file systems that lack features."""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from conftest import ROOT, WITHOUT_GPU, make_pair, run_script, script_server, write_folders, write_tiff
from test_inference_unet import save_random_model
from test_train_unet import arguments, read_csv

import cli
import inference_unet
import train_unet


def start(name, *options, **more):
    """Start a script in the background."""
    command = [sys.executable, ROOT / name, *map(str, options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=WITHOUT_GPU, **more
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- several at once


def test_a_second_training_in_a_folder_is_refused_and_disturbs_nothing(databases, tmp_path):
    options = arguments(databases, tmp_path / "out", "--test_every_n_steps", 3, "--max_epochs", 2)
    first = start("train_unet.py", *options)
    wait_for((tmp_path / "out" / ".lock").exists, first)
    second = run_script("train_unet.py", *options)
    assert second.returncode == 2 and "another training is writing to" in second.stdout, second.stdout
    assert "Traceback" not in second.stdout
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 0, output
    assert [row["epoch"] for row in read_csv(tmp_path / "out" / "metrics.csv")] == ["1", "2"]
    assert not (tmp_path / "out" / ".lock").exists()


def test_what_a_killed_training_left_is_cleared_and_its_folder_is_free(databases, tmp_path):
    folder = tmp_path / "out"
    options = arguments(databases, folder, "--test_every_n_steps", 3, "--max_epochs", 1)
    first = start("train_unet.py", *options)
    wait_for((folder / ".lock").exists, first)
    first.kill()
    first.communicate()
    for leftover in (".saved_model.01234567.part", "checkpoint/.000001.01234567.part"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / "weights").touch()
    (folder / ".curves.01234567.part.png").touch()
    done = run_script("train_unet.py", *options)
    assert done.returncode == 0, done.stdout
    assert not [path for path in folder.rglob(".*")]


def images_and_model(folder, count):
    """Write images of 700 x 700 pixels and a model; return the options that name their folders."""
    (folder / "images").mkdir()
    for index in range(count):
        write_tiff(folder / "images" / f"cell{index}.tif", make_pair(index, (700, 700, 1))[0])
    save_random_model(folder / "model", 1, 2)
    return ["--saved_model_filepath", folder / "model", "--image_folder", folder / "images", "--tile_size", 256]


def test_two_inferences_in_a_folder_do_each_image_once(tmp_path):
    options = images_and_model(tmp_path, 6)
    assert run_script("inference_unet.py", *options, "--output_folder", tmp_path / "alone").returncode == 0
    both = [start("inference_unet.py", *options, "--output_folder", tmp_path / "masks") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(os.listdir(tmp_path / "masks")) == [f"cell{index}.tif" for index in range(6)]
    for index in range(6):
        assert sum(f" cell{index}.tif: 700 x 700" in output for output in outputs) == 1, outputs
        one, other = (tifffile.imread(tmp_path / name / f"cell{index}.tif") for name in ("alone", "masks"))
        np.testing.assert_array_equal(one, other)


def test_what_a_killed_inference_left_is_cleared_by_the_next_one(tmp_path):
    options = [*images_and_model(tmp_path, 3), "--output_folder", tmp_path / "masks", "--save_overlay", 1]
    first = start("inference_unet.py", *options)
    wait_for(lambda: list(tmp_path.glob("masks/.*.part.tif")), first)
    first.kill()
    first.communicate()
    (tmp_path / "masks" / "overlays").mkdir(exist_ok=True)
    (tmp_path / "masks" / "overlays" / ".cell0.01234567.part.png").touch()
    assert run_script("inference_unet.py", *options).returncode == 0
    assert not list((tmp_path / "masks").rglob(".*"))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_model_that_is_replaced_while_it_is_loaded_is_loaded_again(tmp_path, monkeypatch, at_once):
    import tensorflow as tf

    folder, load, loaded = tmp_path / "model", tf.saved_model.load, []
    save_random_model(folder, 1, 2)

    def load_what_goes_away(path):
        loaded.append(path)
        if len(loaded) < 3:
            with cli.replacing_folder(folder) as new:
                shutil.copytree(folder, new, dirs_exist_ok=True)
        return load(path)

    monkeypatch.setattr(tf.saved_model, "load", load_what_goes_away)
    if not at_once:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **options: SimpleNamespace())
    assert inference_unet.load_model(folder).number_classes == 2
    assert len(loaded) == 3


# ---------------------------------------------------------------------------------------------- claims


CLAIM = """
import sys
sys.path.insert(0, {root!r})
import cli, pathlib
with cli.Claims(pathlib.Path({folder!r})) as claims:
    print(claims.claim("a"), claims.claim("b"), flush=True)
    sys.stdin.readline()
"""


def other_claims(folder):
    script = CLAIM.format(root=str(ROOT), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["well", "killed"])
def test_a_claim_is_that_of_one_process_until_it_ends(tmp_path, end):
    with cli.Claims(tmp_path) as claims:
        assert claims.claim("a")
        other = other_claims(tmp_path)
        assert other.stdout.readline() == "False True\n"
        assert claims.claim("a") and not claims.claim("b")
        claims.release("a")
        if end == "killed":
            other.kill()
        other.communicate("\n" if end == "well" else None)
        assert claims.claim("b")
        third = other_claims(tmp_path)
        assert third.stdout.readline() == "True False\n"
    third.communicate("\n")  # the last process to leave
    assert os.listdir(tmp_path) == []


def test_leftovers_are_cleared_by_a_process_that_is_alone_and_by_no_other(tmp_path):
    leftover, unrelated = tmp_path / ".a.01234567.part.tif", tmp_path / ".a.part.tif"
    unrelated.touch()
    other = other_claims(tmp_path)
    other.stdout.readline()
    leftover.touch()
    with cli.Claims(tmp_path):
        assert leftover.exists()
    other.communicate("\n")
    with cli.Claims(tmp_path):
        assert not leftover.exists()
    assert os.listdir(tmp_path) == [unrelated.name]


def test_work_continues_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    leftover = tmp_path / ".a.01234567.part.tif"
    leftover.touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.INFO), cli.Claims(tmp_path) as one, cli.Claims(tmp_path) as other:
        assert one.claim("a") and other.claim("a")
        one.release("a")
    assert leftover.exists()  # it may belong to another process
    assert "cannot lock files in" in caplog.text


# ---------------------------------------------------------------------------------------------- replacing


def write_folder(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_with_all_that_is_in_it(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **options: SimpleNamespace())
    target = tmp_path / "model"
    for text in ("one", "two"):
        with cli.replacing_folder(target) as new:
            (new / "file").write_text(text)
        assert [path.read_text() for path in target.iterdir()] == [text]
        assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(ValueError), cli.replacing_folder(target) as new:
        raise ValueError
    assert os.listdir(tmp_path) == ["model"] and (target / "file").read_text() == "two"


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_folder_whose_replacement_is_killed_is_there_at_the_next_start(tmp_path, monkeypatch, renames):
    write_folder(tmp_path / "model", "old")
    write_folder(tmp_path / ".model.01234567.part", "new")
    rename, left = os.rename, [renames]

    class Killed(BaseException):
        pass

    def rename_and_die(source, target):
        if left[0] == 0:
            raise Killed
        rename(source, target)
        left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **options: SimpleNamespace())
        patch.setattr(os, "rename", rename_and_die)
        try:
            cli.exchange(tmp_path / ".model.01234567.part", tmp_path / "model")
        except Killed:
            pass
    with cli.Claims(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "file").read_text() == ("old" if renames == 1 else "new")


def test_of_several_files_all_are_replaced_or_none(tmp_path, monkeypatch):
    targets = [tmp_path / name for name in ("a", "b", "c")]
    for target in targets[1:]:
        target.write_text("old")
    replace = os.replace

    def fail(source, target):
        if target == targets[2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    def write():
        with cli.replacing_together(targets) as temporaries:
            for temporary in temporaries:
                temporary.write_text("new")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "replace", fail)
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "old", "c": "old"}
    write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new", "c": "new"}


@pytest.mark.parametrize("number, fails", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_no_failure_but_a_broken_disk_is(tmp_path, monkeypatch, number, fails):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if fails:
        with pytest.raises(OSError, match=os.strerror(number)), cli.replacing_folder(tmp_path / "a") as path:
            (path / "file").write_text("new")
    else:
        with cli.replacing_folder(tmp_path / "a") as path:
            (path / "file").write_text("new")
        assert os.listdir(tmp_path) == ["a"]


# ---------------------------------------------------------------------------------------------- exits and signals


@pytest.mark.parametrize("script", ["build_lmdb.py", "train_unet.py", "inference_unet.py"])
def test_a_ctrl_c_while_modules_are_loaded_is_no_traceback(script):
    codes = set()
    for milliseconds in range(0, 200, 20):
        process = start(script, "--label_map", "x")
        while process.poll() is None and "/numpy/" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=20)[0]
        codes.add(process.returncode)
        assert "Traceback" not in output, output
    assert -signal.SIGINT in codes and codes <= {2, 130, -signal.SIGINT}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_inference_leaves_only_complete_masks(tmp_path, number):
    options = [*images_and_model(tmp_path, 4), "--output_folder", tmp_path / "masks"]
    process = start("inference_unet.py", *options)
    wait_for(lambda: list(tmp_path.glob("masks/.*.part.tif")), process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "Traceback" not in output, output
    assert not list((tmp_path / "masks").glob(".*"))
    for path in (tmp_path / "masks").iterdir():
        assert tifffile.imread(path).shape == (700, 700)


@pytest.mark.parametrize("moment", ["start", "join"])
def test_a_signal_while_a_thread_is_started_or_awaited_closes_what_it_prepares(moment, monkeypatch):
    """At these moments the executor has not yet registered the thread, or has stopped waiting for it."""
    closed = []

    def prepare():
        try:
            for number in range(9):
                time.sleep(0.2)
                yield number
        finally:
            closed.append(True)

    start = threading.Thread.start

    def interrupted(self, *arguments):
        monkeypatch.undo()  # send only one signal
        if moment == "start":
            start(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, moment, interrupted)
    items = inference_unet.prefetch(prepare())
    with pytest.raises(KeyboardInterrupt):
        assert next(items) == 0
        time.sleep(0.1)  # until the thread works on the next item
        items.close()
    assert closed == [True]


def test_a_file_that_is_started_and_never_finished_does_not_keep_the_process(tmp_path):
    """A signal just before the context of the file is entered has this effect."""
    script = (
        "import sys, time, numpy as np, inference_unet\n"
        "tiff = inference_unet.TiledTiff(sys.argv[1], (512, 512), np.dtype('uint8'), {})\n"
        "time.sleep(1); raise KeyboardInterrupt\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.tif"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_build_whose_processes_are_all_killed_leaves_no_shared_memory_and_no_semaphore(tmp_path, number):
    write_folders(tmp_path, count=40, shape=(512, 512, 1))
    before = set(os.listdir("/dev/shm"))
    process = start("build_lmdb.py", "--image_folder", tmp_path / "images", "--mask_folder", tmp_path / "masks",
                    "--output_folder", tmp_path / "db", "--num_workers", 2, start_new_session=True)  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("db/.*.part.lmdb")), process)
    during = set(os.listdir("/dev/shm"))
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert not {name for name in during | set(os.listdir("/dev/shm")) if name.startswith(("sem.", "psm_"))} - before


# ---------------------------------------------------------------------------------------------- streams and paths


CLUSTER = '{"cluster": {"worker": ["localhost:1"]}, "task": {"index": %s}}'


def close_output():
    os.close(1)


def test_a_script_without_standard_output_does_its_work(tmp_path):
    images, masks = write_folders(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "build_lmdb.py", "--image_folder", images, "--mask_folder", masks, "--output_folder",
         tmp_path / "db", "--preview", "1"],
        preexec_fn=close_output, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    description = run_script("build_lmdb.py", "--describe", tmp_path / "db" / "train-dataset.lmdb")
    assert description.returncode == 0 and "5 images" in description.stdout, description.stdout


def test_an_output_of_few_letters_loses_no_name(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "build_lmdb.py", "--image_folder", tmp_path / "bïld"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "b\\xefld" in done.stdout, done.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="came with Python 3.11")
@pytest.mark.parametrize("script", ["build_lmdb.py", "train_unet.py", "inference_unet.py"])
def test_the_modules_are_found_on_a_safe_path(script, tmp_path):
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, ROOT / script, "-h"], env=environment, cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"--" in done.stdout


@pytest.mark.parametrize(
    "script, option, value, expected",
    [
        ("build_lmdb.py", "--num_workers", "2147483648", "a whole number from 1 to 1024"),
        ("build_lmdb.py", "--tile_size", "160000", "a whole number from 1 to 16384"),
        ("build_lmdb.py", "--ignore_value", "9" * 30, "a whole number from"),
        ("build_lmdb.py", "--label_map", f"0:0,{'9' * 30}:1", "a whole number from"),
        ("build_lmdb.py", "--channels", "9" * 30, "channels counted from 0"),
        ("build_lmdb.py", "--output_folder", "", "expected a path, got nothing"),
        ("train_unet.py", "--number_classes", "4294967296", "a whole number from 1 to 4096"),
        ("train_unet.py", "--batch_size", "9" * 9, "a whole number from"),
        ("train_unet.py", "--baseline_feature_depth", "9" * 9, "a whole number from"),
        ("train_unet.py", "--max_epochs", "9" * 5000, "a whole number from"),
        ("train_unet.py", "--output_dir", "", "expected a path, got nothing"),
        ("inference_unet.py", "--tile_size", "160000", "a whole number from 1 to 16384"),
        ("inference_unet.py", "--shard", f"1/{'9' * 30}", "such as 2/8"),
        ("inference_unet.py", "--output_folder", "", "expected a path, got nothing"),
        ("inference_unet.py", "--saved_model_filepath", " ", "expected a path, got nothing"),
    ],
)
def test_what_no_computer_can_do_is_refused_at_once(script, option, value, expected, tmp_path):
    done = subprocess.run([sys.executable, ROOT / script, option, value], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_MIN"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2"}, "0 to 1, found 2"),
    ],
)
def test_half_of_a_slurm_environment_is_refused_by_name(variables, expected):
    with pytest.raises(cli.InputError, match=expected):
        inference_unet.shard_from_slurm(variables)


TWO_TASKS = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "variables, expected",
    [
        (TWO_TASKS, "SLURM_STEP_TASKS_PER_NODE"),
        ({**TWO_TASKS, "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**TWO_TASKS, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "on node 0 expected a task from 0 to 0, found 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NODEID"),
    ],
)
def test_gpus_are_not_shared_by_half_of_a_slurm_environment(variables, expected):
    with pytest.raises(cli.InputError, match=expected):
        cli.gpus_of_task(4, variables, may_share=True)


@pytest.mark.parametrize("text", ["", "5", "[]", '{"task": {"index": 0}}', CLUSTER % 1, CLUSTER % -1, CLUSTER % '"x"'])
def test_a_cluster_that_is_none_is_refused(text):
    with pytest.raises(cli.InputError, match="TF_CONFIG"):
        train_unet.Cluster.find({"TF_CONFIG": text})


def test_an_element_of_an_array_reports_that_it_does_a_part_and_does_all_with_shard_1_of_1(tmp_path):
    options = [*images_and_model(tmp_path, 2), "--output_folder", tmp_path / "masks"]
    command = [str(ROOT / "inference_unet.py"), *map(str, options)]
    part = script_server().run(command, **array_of((1, 2), 2))
    assert part.returncode == 0 and "part 2 of 2: 1 of 2 images" in part.stdout, part.stdout
    assert "--shard 1/1 processes all" in part.stdout and os.listdir(tmp_path / "masks") == ["cell1.tif"]
    complete = script_server().run([*command, "--shard", "1/1"], **array_of((1, 2), 2))
    assert complete.returncode == 0 and sorted(os.listdir(tmp_path / "masks")) == ["cell0.tif", "cell1.tif"]


def test_an_image_that_no_record_can_store_is_refused_with_a_solution(tmp_path):
    for name, dtype in (("images", "int32"), ("masks", "uint8")):
        (tmp_path / name).mkdir()
        for index in range(2):  # sparse files; only their header needs to be read
            tifffile.memmap(tmp_path / name / f"cell{index}.tif", shape=(32768, 32768), dtype=dtype, bigtiff=True)
    done = run_script("build_lmdb.py", "--image_folder", tmp_path / "images", "--mask_folder", tmp_path / "masks",
                      "--output_folder", tmp_path / "db")  # fmt: skip
    assert done.returncode == 2 and "4 GiB" in done.stdout and "set --use_tiling 1" in done.stdout, done.stdout


@pytest.mark.parametrize("elements", [(3, 7), (1, 4, 7), (5,), (0, 1, 2, 3)])
def test_the_elements_of_an_array_share_all_images_whatever_their_numbers(elements):
    found = [inference_unet.shard_from_slurm(array_of(elements, element)) for element in elements]
    assert found == [(part, len(elements)) for part in range(1, 1 + len(elements))]


@pytest.mark.parametrize("elements", [(1, 2, 4), (1, 5, 7), (0, 1, 9)])
def test_an_array_with_gaps_is_refused_as_its_shares_are_not_known(elements):
    with pytest.raises(cli.InputError, match="evenly spaced elements"):
        for element in elements:
            inference_unet.shard_from_slurm(array_of(elements, element))


def array_of(elements, element):
    ends = {"MIN": min(elements), "MAX": max(elements), "COUNT": len(elements), "ID": element}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in ends.items()}
