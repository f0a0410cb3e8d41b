"""train_unet.sbatch on a real Slurm cluster, which each test session starts for itself."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import tifffile
from conftest import ROOT, make_pair, readme_commands
from test_interruptions import SHORT, assert_same_end, undisturbed, wait_for  # noqa: F401
from test_train_unet import read_csv

PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
pytestmark = pytest.mark.skipif(
    not all(shutil.which(program, path=SEARCHED) for program in PROGRAMS),
    reason="Slurm is not installed: apt-get install slurmctld slurmd slurm-client munge",
)


class Slurm:
    """A cluster of two nodes on this computer."""

    def __init__(self, folder):
        self.folder = folder
        # If these tests run in a job, its variables would leak into the jobs that they submit.
        outer = re.compile("(SLURM|SBATCH|SRUN)_")
        self.environment = {name: value for name, value in os.environ.items() if not outer.match(name)}
        self.environment.update(SLURM_CONF=f"{folder}/etc/slurm.conf", CUDA_VISIBLE_DEVICES="-1")

    def __call__(self, *command, **options):
        return subprocess.run(
            list(map(str, command)),
            env=self.environment,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            **options,
        ).stdout

    def submit(self, *arguments, **options):
        return self("sbatch", "--parsable", *arguments, **options).splitlines()[-1].split(";")[0]

    def describe(self, job):
        fields = self("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job, states, seconds=200, restarts=0):
        """Wait until a job is in one of `states`; return its description."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.describe(job)
            if found["JobState"] in states and int(found["Restarts"]) >= restarts:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm():
    folder = tempfile.mkdtemp(prefix="sl", dir="/tmp")
    cluster = Slurm(folder)
    cluster("bash", ROOT / "tests" / "slurm_cluster.sh", "start", folder, 2)
    try:
        yield cluster
    finally:
        cluster("bash", ROOT / "tests" / "slurm_cluster.sh", "stop", folder)
        shutil.rmtree(folder, ignore_errors=True)


def submit_training(slurm, databases, folder, *options, nodes=1):
    """Submit a short run that writes to `folder`, on smaller nodes than the script requests."""
    small = ["--gres=gpu:1", "--cpus-per-task=2", f"--nodes={nodes}", f"--output={folder.parent}/job.log"]
    more = ["--baseline_feature_depth", 4, "--batch_size", 2 // nodes, *SHORT, *options]
    return slurm.submit(*small, "train_unet.sbatch", *databases, folder, *more, cwd=ROOT)


@pytest.fixture(scope="module")
def project(databases, tmp_path_factory):
    """Return a folder with the scripts, databases and images laid out as in the README."""
    folder = tmp_path_factory.mktemp("project")
    for path in [*ROOT.glob("*.py"), ROOT / "train_unet.sbatch"]:
        (folder / path.name).symlink_to(path)
    (folder / "data" / "images").mkdir(parents=True)
    for side, database in zip(("train", "test"), databases):
        shutil.copy(database, folder / "data" / f"{side}-cells.lmdb")
    for number in range(5):
        tifffile.imwrite(folder / "data" / "images" / f"{number}.tif", make_pair(number)[0][..., 0])
    return folder


TINY = "--baseline_feature_depth 2 --test_every_n_steps 2 --max_epochs 1 --batch_size 1"
# For the first words of a command: options that make it finish within seconds, and a file it writes in results/.
OF_THE_README = {
    "sbatch train_unet.sbatch": (TINY, "slurm/saved_model/saved_model.pb"),
    "sbatch --nodes=2": (TINY, "two_nodes/saved_model/saved_model.pb"),
    "sbatch --array=1-2": ("", "slurm_masks/4.tif"),
}


@pytest.mark.parametrize("command", [command for command in readme_commands() if command.startswith("sbatch")])
def test_a_command_of_the_readme_runs_as_it_is_written(slurm, project, command):
    more, result = OF_THE_README[" ".join(command.split()[:2])]
    job = re.search(r"Submitted batch job (\d+)", slurm("bash", "-c", f"{command} {more}", cwd=project))[1]
    wait_for(lambda: not slurm("squeue", "-h", "-j", job))
    assert (project / "results" / result).exists(), [path.read_text() for path in project.glob("*-*.*o*")]


def wait_for_step(folder):
    """Wait until a run has finished a test epoch."""
    wait_for(lambda: (folder / "metrics.csv").exists() and len(read_csv(folder / "metrics.csv")) > 0)


@pytest.mark.parametrize("event", ["none", "warned of the time limit", "requeued", "preempted"])
def test_a_job_ends_with_the_same_result_whatever_happens_to_it(slurm, databases, undisturbed, tmp_path, event):  # noqa: F811
    folder = tmp_path / "out put"
    job = submit_training(slurm, databases, folder)
    if event != "none":
        wait_for_step(folder)
    if event == "warned of the time limit":
        slurm("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    elif event == "requeued":
        slurm("scontrol", "requeue", job)
    elif event == "preempted":
        slurm.submit("-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1", cwd=tmp_path)
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
    found = slurm.wait(job, ended, restarts=int(event != "none"))
    log = (tmp_path / "job.log").read_text()
    assert found["JobState"] == "COMPLETED", log
    assert log.count("started before: ") == 1 + (event != "none") and "Traceback" not in log
    assert ("resuming at step" in log) == (event != "none"), log
    assert event != "warned of the time limit" or "Unable to confirm allocation" not in log, log
    assert_same_end(folder, undisturbed)
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"train_unet-{job}*"))


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(slurm, databases, tmp_path):
    folder = tmp_path / "out"
    job = submit_training(slurm, databases, folder, "--max_epochs", 1000)
    wait_for_step(folder)
    slurm("scancel", job)
    slurm.wait(job, {"CANCELLED"})
    wait_for(lambda: "stopped by SIGTERM at step" in (tmp_path / "job.log").read_text(), 30)
    time.sleep(2)
    assert slurm.describe(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("nodes, cores", [(1, 1), (1, 2), (2, 2)])
def test_training_gets_the_cores_of_the_job(slurm, databases, tmp_path, nodes, cores):
    if cores > os.cpu_count():
        pytest.skip("this computer has one core")
    (tmp_path / "train_unet.py").write_text("import os\nprint(f'trains on {len(os.sched_getaffinity(0))} cores')\n")
    small = ["--gres=gpu:1", f"--cpus-per-task={cores}", f"--nodes={nodes}", f"--output={tmp_path}/job.log"]
    # The test cluster binds cores only on request, because jobs of 32 cores must run on a computer with two.
    environment = f"--export=ALL,UNET_HOME={tmp_path},SLURM_CPU_BIND=threads"
    job = slurm.submit(*small, environment, "train_unet.sbatch", *databases, tmp_path / "out", cwd=ROOT)
    found = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"})
    log = (tmp_path / "job.log").read_text()
    assert found["JobState"] == "COMPLETED" and log.count(f"trains on {cores} cores") == nodes, log


def test_two_nodes_train_together_and_only_one_of_them_writes(slurm, databases, tmp_path):
    folder = tmp_path / "out"
    job = submit_training(slurm, databases, folder, nodes=2)
    found = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"})
    log = (tmp_path / "job.log").read_text()
    assert found["JobState"] == "COMPLETED", log
    assert log.count("epoch 3 step 30: train loss") == 1 and "process 1 of 2" in log
    assert [row["step"] for row in read_csv(folder / "metrics.csv")] == ["10", "20", "30"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_job_within_a_minute(slurm, databases, tmp_path, victim):
    folder = tmp_path / "out"
    job = submit_training(slurm, databases, folder, "--max_epochs", 1000, nodes=2)
    wait_for_step(folder)
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(part.endswith("/train_unet.py") for part in process.info["cmdline"] or [])
        and str(folder) in process.info["cmdline"]
        and "srun" not in process.info["cmdline"][0]
    ]
    assert len(workers) == 2
    workers[victim].send_signal(signal.SIGKILL)
    found = slurm.wait(job, {"FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}, seconds=60)
    assert found["JobState"] == "FAILED"
    log = (tmp_path / "job.log").read_text()
    assert "Killed" in log and "another process of this job failed or disappeared" in log and "Traceback" not in log
