"""What a tracker is: how transformers' callback for it is told which run to report to, and how `spin run` reports its stages."""

from __future__ import annotations

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, replace_text

RECORD_FILE = ".trackers.json"
# The axis of every chart: optimiser steps of all iterations, one after the other. transformers' callbacks use this name.
STEP_AXIS = "train/global_step"


@dataclass(frozen=True)
class TrackedRun:
    """One run of a tracker: a training, or the stages of a self-play run.

    ``group`` is shared by the trainings of a self-play run (empty: the training belongs to none), ``name`` is which of them it
    is (``iter1``). ``key`` identifies it: a training that resumes has the same, so it continues the same run of the tracker.
    Local files go to ``folder``.
    """

    group: str
    name: str
    key: str
    folder: Path

    @property
    def title(self) -> str:
        """What it is called among the runs of several groups."""
        return f"{self.group}/{self.name}" if self.group else self.name

    @property
    def shared_name(self) -> str:
        """The name of what contains it, for trackers that have no groups: no other run of the same name writes there."""
        return self.group or f"{self.name}-{self.key[:6]}"


class Tracker(ABC):
    """One tracker. Both methods of reporting use the libraries' own code: transformers' callback, and accelerate's tracker."""

    packages: ClassVar[tuple[str, ...]]  # what pip installs
    module: ClassVar[str]

    @abstractmethod
    def variables(self, run: TrackedRun) -> dict[str, str]:
        """Return the environment variables with which transformers' callback reports to a run; those of the user come first."""

    def configure(self, run: TrackedRun, arguments: Any) -> None:  # noqa: B027  (most read everything from the environment)
        """Set what the callback reads from the arguments of the Trainer instead."""

    def close(self, failed: bool) -> None:  # noqa: B027  (most callbacks close their run themselves)
        """Close a run that the callback left open, as after a failure."""

    @abstractmethod
    def open(self, run: TrackedRun) -> Any:
        """Return accelerate's tracker, started, with ``run`` created or continued; it closes with ``finish()``."""

    def log(self, opened: Any, values: Mapping[str, float], step: int) -> None:
        """Report numbers at a step of the common axis."""
        opened.log(dict(values), step=step)

    def table(self, opened: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:  # noqa: B027
        """Report a table of texts, if the tracker has tables."""


def tracked_key(folder: Path) -> str:
    """Return the key of what is tracked from a folder, which is made at the first call and stored there."""
    record = read_record(folder)
    if not isinstance(record.get("key"), str):
        record = {"key": secrets.token_hex(8)}
        write_record(folder, record)
    return str(record["key"])


def read_record(folder: Path) -> dict[str, Any]:
    """Return what earlier attempts recorded in a folder; empty if there is nothing, or it is damaged."""
    try:
        record = read_json(folder / RECORD_FILE)
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    replace_text(folder / RECORD_FILE, json.dumps(record) + "\n")


def missing_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the environment does not have yet."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; line breaks and bars within cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
