import errno
import os
import pty
import subprocess
import sys

import pytest
from conftest import ROOT

import cli
from cli import InputError, gpus_of_task

SHOW_PROGRESS = """
import cli
cli.configure_logging()
progress = cli.Progress("building", 200, "images", first=50)
for done in (60, 100):
    progress._shown = -1000.0
    progress.update(done, "of cells")
    progress.update(done + 1)
cli.logging.warning("a reader is slow")
progress.close()
"""


def show_progress(**options):
    environment = dict(os.environ, COLUMNS="30")
    script = [sys.executable, "-c", SHOW_PROGRESS]
    return subprocess.run(script, cwd=ROOT, env=environment, check=True, **options)


def test_progress_rewrites_one_line_in_a_terminal():
    terminal, its_end = pty.openpty()
    show_progress(stdout=its_end)
    os.close(its_end)
    first, second, warning, last = os.read(terminal, 10_000).decode().split("\r\x1b[K")[1:]
    assert first.startswith("building 60/200 images of cel") and second.startswith("building 100/200 images of ce")
    assert warning.endswith("WARNING a reader is slow\r\n")
    assert len(first) == len(second) == 29 and last == ""  # the line never wraps and is erased at the end
    os.close(terminal)


def test_progress_is_a_log_line_now_and_then_in_a_file():
    lines = show_progress(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.splitlines()
    assert lines.pop().endswith(" WARNING a reader is slow")
    assert [line.split(" INFO ")[1].split(" of cells ")[0] for line in lines] == [
        "building 60/200 images",
        "building 100/200 images",
    ]
    assert all("images/s, 0:00:0" in line and line.endswith(" left") for line in lines)


def test_a_log_that_nobody_reads_on_ends_in_silence():
    script = "import cli as u; u.configure_logging(); log = u.logging.info\n"
    script += "def work(args, stop): return [log('line %d', number) for number in range(10**5)] and 7\n"
    script += "raise SystemExit(u.run_script(lambda: u.Parser('test', ''), work, []))"
    command = [sys.executable, "-c", script]
    folder = ROOT
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().endswith(b"line 0\n")
        process.stdout.close()  # as head does
        assert process.stderr.read() == b""
    assert process.returncode == 7


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.EROFS, "Read-only file system", "a.png"), "cannot use a.png: Read-only file system; choose a"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded; delete files"),
        (OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN)), "Structure needs cleaning"),
        (MemoryError(), "Cannot allocate memory; request more memory"),
        (InterruptedError(), "InterruptedError"),
        (FileNotFoundError("no database a.lmdb"), "no database a.lmdb"),
        (InputError("expected 1, found 2"), "expected 1, found 2"),
    ],
)
def test_what_the_user_can_fix_is_reported_in_one_line(error, told, caplog, monkeypatch):
    monkeypatch.setattr(cli, "configure_logging", lambda: None)

    def work(args, stop):
        raise error

    assert cli.run_script(lambda: cli.Parser("test", ""), work, []) == 2
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(told)


def test_shared_memory_has_no_name_and_other_processes_find_it():
    before = set(os.listdir("/dev/shm"))
    memory = cli.allocate_shared_memory(5000)
    assert set(os.listdir("/dev/shm")) <= before and memory.size == 5000
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cli\n"
    script += f"cli.attach_shared_memory({memory.name!r}).buf[4999] = 7"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert memory.buf[4999] == 7
    memory.close()
    memory.close()
    assert not os.path.exists(memory.name)


@pytest.mark.parametrize("step", ["posix_fallocate", "fstat"])
def test_shared_memory_that_cannot_be_had_leaves_no_open_file(step, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOMEM, "no memory")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no memory"):
        patch.setattr(os, step, fail)
        cli.allocate_shared_memory(5000)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, disk_log):
    target = tmp_path / "a.png"
    with cli.replacing(target) as temporary:
        temporary.write_text("new")
    assert disk_log == [("flush", temporary), ("rename", target)] and target.read_text() == "new"


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "a.png"
    target.write_text("old")
    with pytest.raises(ValueError), cli.replacing(target) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "kind, message, expected",
    [
        (MemoryError, "", True),
        (RuntimeError, "CUDNN_STATUS_ALLOC_FAILED\nin tensorflow/compiler/xla/stream_executor", True),
        (RuntimeError, "No algorithm worked!  Error messages: RESOURCE_EXHAUSTED: Out of memory", True),
        (RuntimeError, "failed to allocate 2.00GiB from device: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        (RuntimeError, "RESOURCE_EXHAUSTED: weights.data-00000-of-00001; No space left on device", False),
        (RuntimeError, "RESOURCE_EXHAUSTED: weights.data-00000-of-00001; Disk quota exceeded", False),
        (RuntimeError, "CUDNN_STATUS_EXECUTION_FAILED", False),
        (ValueError, "expected 3 channels, found 1", False),
    ],
)
def test_lack_of_memory_is_distinguished_from_a_full_disk_and_from_other_errors(kind, message, expected):
    assert cli.is_out_of_memory(kind(message)) == expected


TASKS = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_GPUS_ON_NODE": "4"}


@pytest.mark.parametrize(
    "visible, node, task, changes, expected",
    [
        (4, 0, 0, {}, [0, 1]),
        (4, 1, 1, {}, [2, 3]),
        (4, 2, 0, {}, [0]),
        (4, 2, 1, {}, [1]),
        (4, 2, 2, {}, [2, 3]),
        (2, 0, 1, {}, [0, 1]),  # Slurm has bound the GPUs
        (1, 2, 2, {}, [0]),
        (4, 0, 1, {"SLURM_STEP_NUM_TASKS": "1"}, [0, 1, 2, 3]),
        (2, 2, 2, {"SLURM_GPUS_ON_NODE": "2"}, [0]),  # shared by tasks 0 and 2
        (0, 0, 1, {}, []),
    ],
)
def test_tasks_of_a_node_share_its_gpus_unless_slurm_has_bound_them(visible, node, task, changes, expected):
    environment = {**TASKS, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(task), **changes}
    assert list(gpus_of_task(visible, environment, may_share=True)) == expected


def test_all_gpus_belong_to_a_process_that_slurm_has_not_started():
    assert list(gpus_of_task(3, {}, may_share=False)) == [0, 1, 2]


def test_a_gpu_for_two_tasks_is_refused_where_they_must_not_share():
    environment = {**TASKS, "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "2"}
    with pytest.raises(InputError, match="expected a GPU for each of the 3 tasks on this node, found 2"):
        gpus_of_task(2, environment, may_share=False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--image_no_data", "-inf"], "write a value that begins with - as --option=VALUE"),
        (["stray\nline\x1b[31m"], r"unrecognized arguments: stray\nline\x1b[31m"),
        (["--split_by", "a{99999999999}"], "expected a regular expression"),
        (["--split_by", "(" * 3000 + ")" * 3000], "expected a regular expression"),
        (["--label_map", "0:" + "1" * 5000], "--label_map: expected a whole number"),
        (["--d", "x"], "could match --dataset_name, --describe (-h lists all options)"),
    ],
)
def test_what_is_wrong_with_arguments_is_one_short_line(arguments, words):
    done = subprocess.run([sys.executable, ROOT / "build_lmdb.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 1500


@pytest.mark.parametrize("call", ["rename", "replace"])
@pytest.mark.parametrize("older", [True, False])
def test_a_signal_between_two_renames_leaves_files_of_one_kind(tmp_path, call, older):
    targets = [tmp_path / "train", tmp_path / "test"]
    for target in targets[: 2 * older]:
        target.write_text("old")
    script = (
        "import os, signal, sys, pathlib, cli\n"
        f"call = os.{call}\n"
        "def interrupted(*names):\n"
        "    call(*names); os.kill(os.getpid(), signal.SIGTERM)\n"
        f"os.{call} = interrupted\n"
        "with cli.StopRequest(), cli.replacing_together([pathlib.Path(name) for name in sys.argv[1:]]) as new:\n"
        "    for path in new: path.write_text('new')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, targets)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    # Existing files are exchanged without os.rename, so patching that sends no signal.
    assert done.returncode == (0 if older and call == "rename" else -2), done.stderr
    assert [target.read_text() for target in targets] == ["new", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_freed_memory_is_kept_for_the_next_allocation_even_if_tensorflow_gives_it_back():
    script = (
        "import resource, sys, numpy as np, cli\n"
        "import ctypes; ctypes.CDLL(None).mallopt(-1, 2**17)  # as TensorFlow does\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): np.empty(2**24, np.uint8)[:] = 1\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(); cli.keep_freed_memory(); faults(); print(first, faults())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    first, kept = map(int, done.stdout.split())
    assert first > 10 * kept
