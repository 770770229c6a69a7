"""This machine: the programs are children of ``spin run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spin.alignment.pipeline.clusters.base import Cluster, ClusterSettings
from spin.alignment.pipeline.clusters.task import forget_tasks
from spin.alignment.pipeline.processes import ChildPrograms
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stages.base import Stage


class LocalCluster(Cluster):
    """A cluster of one: no task, no retry."""

    def __init__(self, settings: ClusterSettings) -> None:
        super().__init__(settings)
        parallel = settings.launch.parallel
        self.children = ChildPrograms(
            settings.run_dir,
            one_thread=parallel,
            prefix=parallel,
            stall_timeout=settings.launch.stall_timeout,
            secrets=settings.secrets,
            look=settings.look,
        )

    @classmethod
    def check(cls, launch: LaunchConfig) -> None:
        """Nothing is needed but this machine."""

    def open(self) -> None:
        """Forget tasks of the run that were started on a cluster before; there is nothing to connect to."""
        forget_tasks(self.run_dir)

    def close(self) -> None:
        """There is nothing to leave."""

    def run(self, stage: Stage, config: Any) -> int:
        self.children.is_hurried = self.is_hurried
        return self.children.run(stage.name, stage.kind.command(stage, config), stage.folder)

    def log_path(self, stage: str) -> Path:
        return self.children.log_path(stage)

    def stop(self) -> None:
        self.children.is_hurried = self.is_hurried
        self.children.stop()
