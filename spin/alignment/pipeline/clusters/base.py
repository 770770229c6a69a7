"""What ``spin run`` asks of the place that its programs run in: this machine, or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stages.base import Stage


@dataclass(frozen=True)
class ClusterSettings:
    """What a cluster is made for.

    Attributes:
        secrets: environment variables that the programs get and no file may contain.
        look: called about once a second while a program runs, with its stage and what it does.
    """

    run_dir: Path
    launch: LaunchConfig
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    look: Callable[[str, str], None] = lambda stage, activity: None


@dataclass(frozen=True)
class Usage:
    """What the programs of a stage took on a cluster.

    Attributes:
        device_seconds: seconds times GPUs, or times processes for those without a GPU, while a task had them.
        restarts: tasks that were started again.
    """

    device_seconds: float = 0.0
    restarts: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.device_seconds + other.device_seconds, self.restarts + other.restarts)


class Cluster(ABC):
    """Runs the programs of stages. Safe to use from several threads, one for each stage that runs."""

    def __init__(self, settings: ClusterSettings) -> None:
        """Prepare to run programs; nothing is started yet."""
        self.settings = settings
        self.run_dir = settings.run_dir
        self.is_hurried: Callable[[], bool] = lambda: False  # whether programs that are being ended are killed at once

    @classmethod
    @abstractmethod
    def check(cls, launch: LaunchConfig) -> None:
        """Check that this kind of cluster can be used from here, before anything is started.

        Raises:
            InputError: a package or command is missing; the sentence says how to get it.
        """

    @abstractmethod
    def open(self) -> None:
        """Connect to the cluster, and check its machines as far as they are known, before the first program.

        Raises:
            InputError: it cannot be reached, or a machine does not share the folder of the run.
        """

    @abstractmethod
    def run(self, stage: Stage, config: Any) -> int:
        """Run the program of a stage with one of its configs and wait for it.

        Returns:
            Its exit code, negative for a signal; 130 if it was interrupted, 2 for bad input.

        Raises:
            ProgramStalled: it made no progress for ``launch.stall_timeout`` seconds, and was ended.
        """

    @abstractmethod
    def log_path(self, stage: str) -> Path:
        """Return the log to read when a stage has failed."""

    @abstractmethod
    def stop(self) -> None:
        """End every program that runs. Nothing starts after this."""

    @abstractmethod
    def close(self) -> None:
        """Leave the cluster; nothing runs any more."""

    def take_usage(self, stage: str) -> Usage:
        """Return what the programs of a stage took since the last call."""
        return Usage()
