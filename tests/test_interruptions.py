"""Check what train_unet.py leaves behind when it is stopped, killed or out of disk space."""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT, run_script, shared_memory_of
from test_train_unet import CHANGED, TWO_REPLICAS, arguments, read_csv

import cli
import train_unet

SHORT = ["--test_every_n_steps", 10, "--max_epochs", 3, "--learning_rate", 3e-3, "--deterministic", 1]


@pytest.fixture(scope="module")
def undisturbed(databases, tmp_path_factory):
    """Return the output folder of a run of 30 steps that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_script("train_unet.py", *arguments(databases, folder, *SHORT))
    assert done.returncode == 0, done.stdout
    return folder


def last_weights(folder):
    """Return all variables of the newest checkpoint of a run."""
    import tensorflow as tf

    newest = max((folder / "checkpoint").iterdir()) / "weights"
    variables = tf.train.load_checkpoint(str(newest))
    names = [name for name in variables.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    return {name: variables.get_tensor(name) for name in names if "save_counter" not in name}


def assert_same_end(folder, expected):
    for name in ("metrics.csv", "confusion.csv", "test_loss.csv"):
        assert (folder / name).read_text() == (expected / name).read_text()
    weights, others = last_weights(folder), last_weights(expected)
    assert weights.keys() == others.keys() and len(weights) > 50
    for name, value in weights.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_was_not(databases, undisturbed, tmp_path, number):
    rng, folder, codes = np.random.default_rng(), tmp_path / "out", []
    more = [*SHORT, "--checkpoint_minutes", 0.001]
    for attempt, stop in enumerate((True, True, False)):
        process = start(databases, folder, tmp_path / f"log{attempt}", *more)
        if stop:
            time.sleep(rng.uniform(0, 5))
            process.send_signal(number)
        codes.append(process.wait(120))
    output = "".join((tmp_path / f"log{attempt}").read_text() for attempt in range(3))
    assert codes[-1] == 0 and set(codes) <= {0, -9 if number == signal.SIGKILL else train_unet.EXIT_STOPPED}, output
    assert "Traceback" not in output, output
    assert_same_end(folder, undisturbed)


STARTED = []


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Kill the processes that a failed test has left running."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def start(databases, folder, log, *more, script=ROOT / "train_unet.py", **options):
    """Start a run in the background; return its process once the network is built."""
    command = [sys.executable, script, *arguments(databases, folder, *more)]
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, **options)
    STARTED.append(process)
    wait_for(lambda: "network of" in log.read_text() or process.poll() is not None)
    return process


def test_two_replicas_that_are_stopped_end_like_two_that_were_not(databases, tmp_path):
    script, more = tmp_path / "two.py", [*SHORT, "--batch_size", 1]
    script.write_text(CHANGED.format(root=str(ROOT), change=TWO_REPLICAS))
    start_two = functools.partial(start, databases, script=script)
    assert start_two(tmp_path / "undisturbed", tmp_path / "log", *more).wait(300) == 0
    for attempt, seconds in enumerate((2, 4)):
        process = start_two(tmp_path / "stopped", tmp_path / f"log{attempt}", *more)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) in (0, train_unet.EXIT_STOPPED)
    assert start_two(tmp_path / "stopped", tmp_path / "last", *more).wait(300) == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "undisturbed")


HANGS = """
    import unet_model
    sums = unet_model.Loss.sums
    def hang(*arguments, **options):
        asleep = tf.numpy_function(lambda: print("asleep", flush=True) or time.sleep(600), [], [])
        with tf.control_dependencies([asleep]):
            return sums(*arguments, **options)
    unet_model.Loss.sums = hang
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_whose_step_hangs(databases, tmp_path, number):
    script = tmp_path / "hangs.py"
    script.write_text(CHANGED.format(root=str(ROOT), change=HANGS))
    process = start(databases, tmp_path / "out", tmp_path / "log", script=script)
    wait_for(lambda: "asleep" in (tmp_path / "log").read_text())
    process.send_signal(number)
    wait_for(lambda: "send the signal again to stop at once" in (tmp_path / "log").read_text(), 5)
    if number == signal.SIGTERM:
        time.sleep(cli.SAME_REQUEST_SECONDS + 0.1)
    process.send_signal(number)
    assert process.wait(1) == 128 + number


def test_a_terminal_that_closes_does_not_end_what_nohup_protects(databases, tmp_path):
    process = start(databases, tmp_path / "out", tmp_path / "log", *SHORT,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # fmt: skip
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0


def test_a_second_signal_ends_at_once(databases, tmp_path):
    process = start(databases, tmp_path / "out", tmp_path / "log")
    wait_for(lambda: len(shared_memory_of(process.pid)) == 2)  # of the train and the test reader
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(3):  # two signals at once may be delivered as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(60) in (128 + signal.SIGINT, train_unet.EXIT_STOPPED)
    assert not psutil.wait_procs(children, timeout=10)[1]  # the readers notice a little later


def with_small_disk(place, size, script):
    """Run a shell script while the folder `place` is a disk of its own; return its output."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    script = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(place))} && {script}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True).stdout  # fmt: skip


def test_a_disk_that_is_full_from_the_start_is_reported(databases, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    command = shlex.join(map(str, [sys.executable, ROOT / "train_unet.py", *arguments(databases, folder)]))
    fill = f"(head -c 200000 /dev/zero > {shlex.quote(str(folder / 'filler'))} || true)"
    output = with_small_disk(folder, "100k", f"{fill}; {command}; echo code $?")
    assert "Traceback" not in output and "Logging error" not in output, output
    assert re.search(r"ERROR cannot write results in .*No space left on device.*\ncode 1\n$", output), output


def test_a_full_disk_is_reported_and_the_run_resumes_from_the_checkpoint_before_it(databases, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    more = ["--test_every_n_steps", 10, "--learning_rate", 3e-3]
    command = [sys.executable, ROOT / "train_unet.py", *arguments(databases, folder, *more)]
    first, second = (shlex.join(map(str, [*command, "--max_epochs", epochs])) for epochs in (1, 3))
    place = shlex.quote(str(folder))
    # One checkpoint takes about 1.5 MB, the exported model about 1 MB. A filler leaves 1.2 MB of the disk free.
    script = (
        f"{first} && "
        f"head -c $(( $(df --output=avail -B1 {place} | tail -1) - 1200000 )) /dev/zero > {place}/filler; "
        f"{second}; echo code $?; rm {place}/filler; {second}; echo code $?; ls -A {place}/checkpoint"
    )
    output = with_small_disk(folder, "20m", script)
    assert "Traceback" not in output and re.findall(r"^code (\d+)", output, re.M) == ["1", "0"], output
    assert re.search(r"ERROR cannot write .* Earlier checkpoints are kept", output), output
    assert output.count("resuming at step 10, after 1 test epochs") == 2
    assert output.split()[-2:] == ["000002", "000003"]


@pytest.mark.parametrize("event", ["interrupted", "reader killed", "killed", "all killed"])
def test_nothing_outlives_a_run_that_ends_early(databases, tmp_path, event):
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(databases, folder, log, "--test_every_n_steps", 3, start_new_session=True)
    wait_for(lambda: (folder / "metrics.csv").exists() and len(read_csv(folder / "metrics.csv")) > 1)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == len(shared_memory_of(process.pid)) == 2
    if event == "interrupted":
        os.killpg(process.pid, signal.SIGINT)
    elif event == "killed":
        process.kill()
    elif event == "all killed":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        workers[0].kill()
        # Reported at once, even if the main thread is busy exporting a model.
        wait_for(lambda: "exit code -9" in log.read_text(), seconds=10)
    process.wait(60)
    output = log.read_text()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert "Traceback" not in output, output
    if event == "reader killed":
        assert process.returncode == 1
        assert re.search(r"ERROR train reader worker 0 \(process \d+\).*killed by SIGKILL, exit code -9", output)
    elif event == "interrupted":
        assert process.returncode == 85 and "stopped by SIGINT at step" in output
        assert f"the best model so far is in {folder}/saved_model" in output


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
