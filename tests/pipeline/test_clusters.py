"""Programs as tasks of a cluster: how they are divided, when they are started again, and what the user is told."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.clusters import CLUSTERS, ClusterSettings, team
from spin.alignment.pipeline.clusters.handle import Ending, Handle
from spin.alignment.pipeline.clusters.local import LocalCluster
from spin.alignment.pipeline.clusters.node import run_task
from spin.alignment.pipeline.clusters.remote import RemoteCluster, shared_environment
from spin.alignment.pipeline.clusters.task import TASKS_FOLDER, Task, mark_ended, mark_started
from spin.alignment.pipeline.clusters.team import ProgramLost
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.processes import ProgramStalled, log_path
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stage_program import Node, StageProgram
from spin.alignment.pipeline.stages import make_stages
from spin.alignment.pipeline.stalls import process_state
from spin.alignment.pipeline.start_programs import PLAIN_STARTS_VARIABLE
from tests.helpers.cluster_stages import script_stage
from tests.helpers.runs import tiny_run, write_config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("LOOK_SECONDS", 0.01), ("_FILE_SECONDS", 0.0), ("_CANCEL_SECONDS", 0.5)):
        monkeypatch.setattr(team, name, seconds)


# --- what a program needs -------------------------------------------------------------------------------------------------


def test_workers_are_placed_one_by_one_and_a_group_as_a_whole():
    workers = StageProgram("generate.py", ["--a"], "workers", processes=4, gpus=2, config_file="c.yaml")
    assert workers.workers() == [StageProgram("generate.py", ["--a"], "one", gpus=2)] * 4
    group = dataclasses.replace(workers, spread="group")
    assert group.workers() == [group]


def test_the_commands_of_a_group_differ_in_the_rank_only():
    group = StageProgram("run_spin.py", ["c.yaml"], "group", processes=16, nodes=2, config_file="zero3.yaml")
    first, second = (group.command(Node(rank, 2, "10.0.0.7", 4711)) for rank in (0, 1))
    assert {*first} ^ {*second} == {"--machine_rank=0", "--machine_rank=1"}
    told = {"--num_processes=16", "--config_file=zero3.yaml", "--num_machines=2", "--main_process_ip=10.0.0.7"}
    told |= {"--main_process_port=4711", "--deepspeed_multinode_launcher=standard", "--rdzv_backend=static"}
    assert told <= {*first} and first[-1] == "c.yaml" and first[-2].endswith("spin/run_spin.py")


def test_accelerate_takes_the_flags_of_a_group():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    for config_file in (None, "configs/deepspeed_zero3.yaml"):
        program = StageProgram("run_spin.py", ["c.yaml"], "group", processes=4, nodes=2, config_file=config_file)
        words = program.command(Node(1, 2, "10.0.0.7", 4711))[3:]
        found, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert (found.num_machines, found.machine_rank, found.num_processes) == (2, 1, 4)
        assert found.main_process_port == 4711 and found.same_network and found.rdzv_backend == "static"
        assert found.use_deepspeed is (config_file is not None)


def test_what_each_stage_of_a_run_asks_for(tmp_path):
    launch = {"cluster": "slurm", "num_processes": 8, "generate_processes": 4, "nodes": 2}
    generate = {"backend": "vllm", "tensor_parallel_size": 2, "max_new_tokens": 8}
    evaluate = {**generate, "temperatures": [1.0]}
    train = {**tiny_run(tmp_path)["train"], "use_cpu": False}
    values = tiny_run(tmp_path, iterations=1, overrides=None, generate=generate, evaluate=evaluate, launch=launch)
    config = load_run_config(write_config(tmp_path / "config.yaml", {**values, "train": train}))
    found = {stage.name: stage.kind.program_of(stage, stage.configs[0]) for stage in make_stages(config)}
    asked = {name: (p.spread, p.processes, p.nodes, p.gpus) for name, p in found.items()}
    assert asked == {
        "sft/evaluate": ("group", 4, 2, 2),
        "iter0/generate": ("workers", 4, 1, 2),
        "iter0/convert": ("one", 1, 1, 0),
        "iter0/train": ("group", 8, 2, 1),
        "iter0/evaluate": ("group", 4, 2, 2),
    }


@pytest.mark.parametrize(
    ("launch", "sentence"),
    [
        ({"nodes": 2}, "launch.nodes is for a cluster, but launch.cluster is local.*ray or slurm"),
        (
            {"cluster": "ray", "sbatch": ["--partition=gpu"]},
            "launch.sbatch is for a cluster, but launch.cluster is ray",
        ),
        ({"cluster": "ray", "nodes": 2, "num_processes": 3}, "launch.num_processes is 3, which 2 machines"),
        ({"cluster": "pbs"}, "cluster is pbs|'pbs'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(launch, sentence):
    with pytest.raises(InputError, match=sentence):
        LaunchConfig(**launch)


def test_every_value_of_the_setting_is_in_the_registry():
    assert {*get_args(get_type_hints(LaunchConfig)["cluster"])} == {*CLUSTERS}


def test_what_belongs_to_a_machine_is_not_sent_to_others(monkeypatch):
    for name in ("PATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "SLURM_JOB_ID", "HF_HOME"):
        monkeypatch.setenv(name, "/here")
    sent = shared_environment()
    assert sent["HF_HOME"] == "/here" and not {"PATH", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "SLURM_JOB_ID"} & {
        *sent
    }


def test_the_machines_of_a_group_meet_where_the_first_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIN_NODE_ADDRESS", "10.0.0.7")
    program = StageProgram("run_spin.py", ["c.yaml"], "group", processes=2, nodes=2)
    task = Task("a/b.0", tmp_path / "task", program, tmp_path, tmp_path, None, 0.0, False)
    task.write()
    assert Task.read(task.folder) == dataclasses.replace(
        task, program=dataclasses.replace(program, arguments=["c.yaml"])
    )
    found = []
    second = threading.Thread(target=lambda: found.append(Task.read(task.folder).meet(1)))
    second.start()
    first = task.meet(0)
    second.join(20)
    assert (first.rank, first.count, first.address) == (0, 2, "10.0.0.7") and first.port
    assert found == [dataclasses.replace(first, rank=1)]


# --- a task on its machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Returns a function that writes the task of a script with some code."""
    monkeypatch.chdir(tmp_path)  # which a task changes
    monkeypatch.setenv(PLAIN_STARTS_VARIABLE, "1")

    def write(code: str) -> Task:
        (tmp_path / "program.py").write_text(code)
        program = StageProgram(str(tmp_path / "program.py"), [])
        run_dir = tmp_path / "run"
        made = Task("a/b.0", run_dir / TASKS_FOLDER / "1" / "0", program, run_dir, tmp_path, None, 0.0, False)
        made.write()
        return made

    return write


def test_a_task_of_another_version_does_not_start(task, monkeypatch, capfd):
    made = task("open('ran', 'w')")
    monkeypatch.setattr("spin.alignment.pipeline.clusters.task.project_version", lambda: "0.0.1 (code 1a2b3c4d)")
    assert run_task(made.folder, 0) == 2 and not (made.cwd / "ran").exists()
    assert made.endings()[0]["code"] == 2 and not made.has_started()
    said = capfd.readouterr().err
    assert (
        f"error: the machine {socket.gethostname()} has selfplay-spin 0.0.1 (code 1a2b3c4d), but `spin run` is" in said
    )


def test_a_task_that_cannot_write_its_log_is_not_called_lost(task, monkeypatch, capfd):
    def open_log(*_: object) -> None:
        raise InputError("a-b.0.log cannot be written (read-only)")

    monkeypatch.setattr("spin.alignment.pipeline.processes.StageOutput.__enter__", open_log)
    made = task("")
    assert run_task(made.folder, 0) == 2 and made.endings()[0]["code"] == 2
    assert "error: a-b.0.log cannot be written" in capfd.readouterr().err


def test_a_task_ends_once_nobody_waits_for_it(task):
    """As when Ray has ended `spin run` because its head was lost, and the run is continued on this machine."""
    made = task("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    codes = []
    running = threading.Thread(target=lambda: codes.append(run_task(made.folder, 0)))
    running.start()
    while not (pid := (made.cwd / "pid")).exists() or not pid.read_text():
        time.sleep(0.02)
    LocalCluster(ClusterSettings(made.run_dir, LaunchConfig())).open()
    running.join(20)
    assert codes == [130] and process_state(int(pid.read_text())) in ("", "Z")
    assert not (made.run_dir / TASKS_FOLDER).exists()


def test_what_a_lost_machine_has_left_open_is_in_no_ones_way(tmp_path, monkeypatch):
    """NFS keeps a file that is open elsewhere, under another name, and with it its folder."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    settings = ClusterSettings(tmp_path / "run", LaunchConfig(cluster="slurm"))
    stage = script_stage(tmp_path, "", settings.launch)
    for _ in range(2):
        cluster = ToldCluster(settings, [OK])
        cluster.open()
        assert cluster.run(stage, stage.configs[0]) == 0


# --- a team, with tasks that end as told ----------------------------------------------------------------------------------


class Told(Handle):
    """A task that ends as told at its first look; None: it runs until it is cancelled."""

    def __init__(self, task: Task, ending: dict | None) -> None:
        self.task, self.ending, self.is_cancelled = task, ending, False
        if ending is not None and ending.get("started", True):
            mark_started(task.folder, 0)
        for rank, code in enumerate((ending or {}).get("codes", ())):
            if code is not None:
                mark_ended(task.folder, rank, code, ending.get("stalled", ""))
        (task.folder / "output-0").write_text(f"{task.name} speaks\n")

    def poll(self) -> Ending | None:
        if self.is_cancelled:
            return Ending(False, "cancelled")
        if self.ending is None or "codes" not in self.ending:
            return None
        return Ending(all(code == 0 for code in self.ending["codes"]), self.ending.get("reason", ""))

    def cancel(self) -> None:
        self.is_cancelled = True

    kill = cancel


class ToldCluster(RemoteCluster):
    """Starts tasks that end, in the order in which they are started, as told."""

    def __init__(self, settings: ClusterSettings, endings: list[dict | None]) -> None:
        super().__init__(settings)
        self.endings, self.handles = iter(endings), []

    @classmethod
    def check(cls, launch: LaunchConfig) -> None:
        """Always there."""

    def start(self, task: Task) -> Handle:
        self.handles.append(Told(task, next(self.endings)))
        return self.handles[-1]


OK, LOST, FAILED = {"codes": [0]}, {"codes": [None], "reason": "the node died"}, {"codes": [7]}


@pytest.fixture
def told(tmp_path):
    """Returns a function that runs a program whose tasks end as told; it returns the cluster and the exit code."""

    def run(*endings: dict | None, spread="workers", processes: int = 1, nodes: int = 1, retries: int = 1):
        launch = LaunchConfig(cluster="slurm", num_processes=processes, nodes=nodes, retries=retries)
        cluster = ToldCluster(ClusterSettings(tmp_path / "run", launch), list(endings))
        cluster.open()
        stage = script_stage(tmp_path, "", launch, spread)
        for number in range(processes):  # what the program itself has logged on its machine
            log = log_path(cluster.run_dir, f"a/b.{number}")
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("Traceback\nMemoryError of the program\n")
        return cluster, lambda: cluster.run(stage, stage.configs[0])

    return run


def test_a_lost_task_is_started_again_and_counted(told, capfd):
    cluster, run = told(LOST, OK)
    assert run() == 0 and len(cluster.handles) == 2
    said = capfd.readouterr().out
    assert "a/b.0 was lost (the node died): starting it again (1 of 1)" in said and said.count("a/b.0 speaks") == 2
    usage = cluster.take_usage("a/b")
    assert usage.restarts == 1 and usage.device_seconds > 0 and cluster.take_usage("a/b").restarts == 0


def test_after_its_last_restart_a_lost_task_fails_the_stage_with_its_last_lines(told, capfd):
    cluster, run = told(LOST, LOST)
    with pytest.raises(
        ProgramLost, match=r"its task a/b\.0 was lost \(the node died\) after 1 restarts \(launch.retries\)"
    ):
        run()
    assert "MemoryError of the program" in capfd.readouterr().out
    assert cluster.log_path("a/b").name == "a-b.0.log"


def test_an_exit_code_is_the_programs_own_after_its_restarts(told):
    cluster, run = told(FAILED, FAILED)
    assert run() == 7 and cluster.log_path("a/b").name == "a-b.0.log"


def test_bad_input_is_not_tried_again_and_ends_the_others(told):
    cluster, run = told({"codes": [2]}, None, processes=2)
    assert run() == 2 and [handle.is_cancelled for handle in cluster.handles] == [False, True]


def test_when_one_worker_is_done_those_that_wait_for_a_machine_are_not_needed(told):
    cluster, run = told(OK, {"started": False}, processes=2)
    started = time.monotonic()
    assert run() == 0 and time.monotonic() - started < 5
    assert [handle.is_cancelled for handle in cluster.handles] == [False, True]


def test_a_worker_that_fails_after_the_work_is_done_does_not_matter(told):
    _, run = told(OK, FAILED, processes=2, retries=0)
    assert run() == 0


def test_a_group_fails_with_the_machine_that_failed_and_not_with_those_it_ended(told):
    failing = {"codes": [130, 1]}
    cluster, run = told(failing, spread="group", processes=2, nodes=2, retries=0)
    assert run() == 1 and cluster.log_path("a/b").name == "a-b.0.1.log"


def test_a_stalled_program_is_reported_with_what_it_was_doing(told):
    _, run = told({"codes": [1], "stalled": "rank 3 is at data.py line 9 in read"}, retries=5)
    with pytest.raises(ProgramStalled, match=r"rank 3 is at data\.py"):
        run()


def test_stop_ends_every_task_and_starts_no_more(told):
    cluster, run = told(None, None, processes=2)
    threading.Timer(0.2, cluster.stop).start()
    assert run() == 130 and all(handle.is_cancelled for handle in cluster.handles)
    assert run() == 130 and len(cluster.handles) == 2


def test_the_folder_of_the_tasks_does_not_outlive_the_run(told):
    cluster, run = told(OK)
    assert run() == 0 and any(cluster.folder.iterdir())
    cluster.close()
    assert not cluster.folder.exists() and Path(cluster.run_dir, "logs", "a-b.log").is_file()
