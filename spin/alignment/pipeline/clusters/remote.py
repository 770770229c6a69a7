"""What clusters of several machines have in common: tasks described by files in the run directory, which all machines share."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
from abc import abstractmethod
from pathlib import Path
from typing import Any

from spin.alignment.core.console import MARK_VARIABLE
from spin.alignment.core.program import EXIT_INTERRUPTED, RUN_VARIABLE
from spin.alignment.pipeline.clusters.base import Cluster, ClusterSettings, Usage
from spin.alignment.pipeline.clusters.handle import Handle
from spin.alignment.pipeline.clusters.task import TASKS_FOLDER, Task, forget_tasks
from spin.alignment.pipeline.clusters.team import Team, TeamSettings
from spin.alignment.pipeline.processes import log_path
from spin.alignment.pipeline.stage_output import StageOutput
from spin.alignment.pipeline.stages.base import Stage

NODE_MODULE = "spin.alignment.pipeline.clusters.node"
TOKEN_NAME = "token"
_STOP_SECONDS = 60.0


class RemoteCluster(Cluster):
    """Runs each program as one task or several; a subclass knows how a task is handed to its cluster."""

    def __init__(self, settings: ClusterSettings) -> None:
        super().__init__(settings)
        self.run_dir = settings.run_dir.resolve()
        self.stopping = threading.Event()
        self.token = secrets.token_hex(8)
        marked = {RUN_VARIABLE: str(self.run_dir), MARK_VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
        self.environment = {**settings.secrets, **marked}  # of every task, beside that of `spin run`
        self._numbers = itertools.count()
        self._usage: dict[str, Usage] = {}
        self._failed_logs: dict[str, Path] = {}
        self._changed = threading.Condition()
        self._running = 0

    @property
    def folder(self) -> Path:
        """The folder of the tasks, which exists while the run does; of every `spin run` another."""
        return self.run_dir / TASKS_FOLDER / self.token

    @abstractmethod
    def start(self, task: Task) -> Handle:
        """Hand a task to the cluster, which starts it when there are machines for it."""

    def open(self) -> None:
        """Make the folder of the tasks, with a token by which a machine shows that it sees the same one."""
        forget_tasks(self.run_dir)
        self.folder.mkdir(parents=True)
        (self.folder / TOKEN_NAME).write_text(self.token, encoding="ascii")

    def close(self) -> None:
        forget_tasks(self.run_dir)

    def run(self, stage: Stage, config: Any) -> int:
        program = stage.kind.program_of(stage, config)
        with self._changed:
            if self.stopping.is_set():
                return EXIT_INTERRUPTED
            self._running += 1
        prefix = f"[{stage.name}] " if self.settings.launch.parallel else ""
        try:
            with StageOutput(log_path(self.run_dir, stage.name), prefix) as output:
                team = Team(self._team_settings(stage), program, output)
                try:
                    return team.run()
                finally:
                    self._note(stage.name, team)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _note(self, stage: str, team: Team) -> None:
        with self._changed:
            self._usage[stage] = self._usage.get(stage, Usage()) + team.usage
            if team.failed_log is not None:
                self._failed_logs[stage] = team.failed_log

    def _team_settings(self, stage: Stage) -> TeamSettings:
        return TeamSettings(
            stage=stage.name,
            folder=stage.folder,
            run_dir=self.run_dir,
            launch=self.settings.launch,
            task_folder=lambda name: self.folder / f"{name.replace('/', '-')}-{next(self._numbers)}",
            start=self.start,
            wait=self.stopping.wait,
            is_hurried=lambda: self.is_hurried(),
            look=self.settings.look,
        )

    def gpus_per_node(self, task: Task) -> int:
        return task.processes_per_node * task.program.gpus * self.settings.launch.gpus

    def cpus_per_node(self, task: Task) -> int:
        return task.processes_per_node * self.settings.launch.cpus

    def log_path(self, stage: str) -> Path:
        return self._failed_logs.get(stage) or log_path(self.run_dir, stage)

    def stop(self) -> None:
        self.stopping.set()
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, _STOP_SECONDS)

    def take_usage(self, stage: str) -> Usage:
        with self._changed:
            return self._usage.pop(stage, Usage())


# Variables that belong to the machine or to the job that `spin run` runs in: a task on another machine has its own.
_OF_MACHINE = ("PATH", "HOME", "USER", "LOGNAME", "HOSTNAME", "SHELL", "PWD", "OLDPWD", "TMPDIR", "VIRTUAL_ENV", "_")
_OF_MACHINE_PREFIXES = ("LD_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "CONDA_", "SLURM_", "RAY_", "SSH_", "XDG_")


def shared_environment() -> dict[str, str]:
    """Return the variables of this process that programs on other machines should see too, such as HF_HOME and WANDB_MODE."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_MACHINE and not name.startswith(_OF_MACHINE_PREFIXES)
    }
