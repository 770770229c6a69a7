"""Programs as jobs of Slurm, whose commands are faked; the jobs are real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline import clusters
from spin.alignment.pipeline.clusters import ClusterSettings, SlurmCluster, slurm_cluster, team
from spin.alignment.pipeline.clusters.task import Task
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stage_program import StageProgram
from spin.alignment.pipeline.stalls import process_state
from tests.helpers import REPOSITORY, fake_slurm
from tests.helpers.cluster_stages import FIRST_HANGS, Running, script_stage


@pytest.fixture(autouse=True)
def slurm(tmp_path, monkeypatch) -> Path:
    """The folder of a fake Slurm that is on PATH."""
    monkeypatch.setattr(team, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(team, "_FILE_SECONDS", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path / 'slurm')}:{os.environ['PATH']}")
    return tmp_path / "slurm"


def make_cluster(run_dir: Path, **launch) -> SlurmCluster:
    settings = LaunchConfig(**{"cluster": "slurm", "cpus": 3, "retries": 1, **launch})
    cluster = SlurmCluster(ClusterSettings(run_dir, settings, secrets={"HF_TOKEN": "hf_secret"}))
    cluster.open()
    return cluster


def run(cluster: SlurmCluster, root: Path, code: str, **settings) -> Running:
    return Running(cluster, script_stage(root, code, cluster.settings.launch, **settings))


def wait_for(path: Path, seconds: float = 30.0) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def test_a_worker_that_is_killed_is_submitted_again_and_the_jobs_get_what_they_need(
    tmp_path, slurm, capfd, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")  # as if `spin run` itself ran in a job
    cluster = make_cluster(tmp_path / "run", num_processes=2, sbatch=["--partition=gpu"])
    check = 'assert os.environ["HF_TOKEN"] == "hf_secret" and os.environ["SLURM_JOB_ID"] != "1234"\n'
    running = run(cluster, tmp_path, check + FIRST_HANGS)
    pid = int(wait_for(tmp_path / "run" / "a" / "pid"))
    # The node dies: the process that started the program, and the program with it.
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    while process_state(pid) not in ("", "Z"):
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    deadline = time.monotonic() + 30
    while len(fake_slurm.jobs_of(slurm)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "run" / "a" / "lost").touch()
    assert running.result() == 0 and cluster.take_usage("a/b").restarts == 1
    said = capfd.readouterr().out
    assert "finished the work" in said
    jobs = fake_slurm.jobs_of(slurm)
    options = jobs["1"]["options"]
    assert (options["nodes"], options["cpus-per-task"], options["partition"]) == ("1", "3", "gpu")
    assert "gpus-per-node" not in options and options["job-name"].startswith("spin-")
    assert not any(job["runs"] for job in jobs.values())
    assert b"hf_secret" not in b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_a_program_that_fails_shows_its_last_lines_and_its_own_code(tmp_path, capfd):
    cluster = make_cluster(tmp_path / "run", retries=0)
    code = 'print("a library says why"); sys.exit(9)'
    assert run(cluster, tmp_path, code).result() == 9
    assert "a library says why" in capfd.readouterr().out
    assert "a library says why" in cluster.log_path("a/b").read_text()


def test_bad_input_ends_the_stage_at_once(tmp_path, slurm, capfd):
    cluster = make_cluster(tmp_path / "run", num_processes=2, retries=5)
    code = 'sys.stderr.write("\\x1eerror: row 7 is bad\\n"); sys.exit(2)'
    assert run(cluster, tmp_path, code).result() == 2
    assert "error: row 7 is bad" in capfd.readouterr().out and len(fake_slurm.jobs_of(slurm)) == 2


def test_stop_cancels_the_jobs(tmp_path, slurm):
    cluster = make_cluster(tmp_path / "run")
    running = run(cluster, tmp_path, '(folder / "pid").write_text(str(os.getpid())); time.sleep(60)')
    pid = int(wait_for(tmp_path / "run" / "a" / "pid"))
    cluster.stop()
    assert running.result() == 130 and process_state(pid) in ("", "Z")
    assert [job["runs"] for job in fake_slurm.jobs_of(slurm).values()] == [False]


def test_jobs_that_a_killed_run_has_left_are_cancelled_before_anything_starts(tmp_path, slurm):
    left = make_cluster(tmp_path / "run")
    other = make_cluster(tmp_path / "other run")
    for cluster in (left, other):
        script = tmp_path / "job.sh"
        script.write_text("exec sleep 60")
        words = [
            "sbatch",
            f"--job-name={cluster.job_name}",
            f"--output={tmp_path}/out",
            f"--chdir={tmp_path}",
            "--nodes=1",
        ]
        subprocess.run([*words, str(script)], check=True, capture_output=True)
    make_cluster(tmp_path / "run")
    try:
        assert [job["runs"] for job in fake_slurm.jobs_of(slurm).values()] == [False, True]
    finally:
        make_cluster(tmp_path / "other run")


def test_a_job_that_an_interrupt_kept_from_being_cancelled_is_ended_at_the_close(tmp_path, slurm):
    cluster = make_cluster(tmp_path / "run")
    task = Task("a/b.0", cluster.folder / "0", StageProgram("no.py", []), cluster.run_dir, tmp_path, None, 0.0, False)
    task.write()
    (cluster.folder / "token").unlink()
    os.mkfifo(cluster.folder / "token")  # the job waits for somebody to write to it
    cluster.start(task)  # the interrupt comes before anybody keeps its handle
    deadline = time.monotonic() + 20
    while not fake_slurm.jobs_of(slurm):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    cluster.close()
    assert [job["runs"] for job in fake_slurm.jobs_of(slurm).values()] == [False]


def test_a_slurm_that_does_not_answer_is_said_before_anything_starts(tmp_path, slurm, monkeypatch):
    """Jobs that an earlier run has left may still write to the same files."""
    monkeypatch.setattr(slurm_cluster, "_GONE_SECONDS", 0.0)
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"does not say whether jobs .* are left \(slurm_load_jobs error: Unable"):
        make_cluster(tmp_path / "run")
    monkeypatch.setattr(slurm_cluster, "_COMMAND_SECONDS", 0.2)
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(InputError, match=r"\(squeue does not answer within 0 s\)"):
        make_cluster(tmp_path / "run")


@pytest.mark.parametrize("option", ["--job-name=mine", "--output=job.log", "-N4", "--array=1-3"])
def test_an_option_by_which_jobs_are_found_or_sized_is_refused(option):
    with pytest.raises(InputError, match=rf"launch\.sbatch sets {option}, which `spin run` decides"):
        SlurmCluster.check(LaunchConfig(cluster="slurm", sbatch=["--partition=gpu", "-A", "account", option]))


def test_what_sbatch_refuses_is_one_sentence(tmp_path):
    cluster = make_cluster(tmp_path / "run", sbatch=["--partition=nowhere"])
    error = run(cluster, tmp_path, "").result()
    assert isinstance(error, InputError)
    assert "sbatch: error: invalid partition specified: nowhere" in str(error) and "launch.sbatch" in str(error)


def test_a_machine_without_the_folder_is_named(tmp_path):
    cluster = make_cluster(tmp_path / "run")
    cluster.token = "another"  # the machine finds a folder of that name on a disk of its own
    error = run(cluster, tmp_path, "").result()
    assert isinstance(error, InputError) and "(node7) does not see the folder of the run" in str(error)


def test_without_the_commands_nothing_is_started(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="no command sbatch here: start the run on a login node"):
        clusters.CLUSTERS["slurm"].check(LaunchConfig(cluster="slurm"))


def test_a_group_starts_on_all_its_machines_and_meets(tmp_path, slurm):
    """Two machines of one process each, started by accelerate launch as a training is."""
    cluster = make_cluster(tmp_path / "run", num_processes=2, nodes=2, cpus=1)
    code = "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')\n"
    code += "import json; (folder / os.environ['RANK']).write_text(json.dumps([os.environ[name] for name in names]))"
    assert run(cluster, tmp_path, code, spread="group").result(120) == 0
    found = [json.loads((tmp_path / "run" / "a" / rank).read_text()) for rank in "01"]
    assert [item[:3] for item in found] == [["0", "2", "0"], ["1", "2", "0"]]
    assert len(fake_slurm.jobs_of(slurm)) == 1
    assert "--machine_rank=1" in (tmp_path / "run" / "logs" / "a-b.0.1.log").read_text()


def test_the_script_for_slurm_says_that_there_is_none(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    script = REPOSITORY / "scripts" / "slurm" / "spin_iteration.sbatch"
    given = {"ITER": "0", "MODEL": "m", "INPUT_DIR": "d", "PATH": str(tmp_path)}
    done = subprocess.run(["bash", script], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command sbatch here: run this on a login node of the cluster (see -h)\n"
