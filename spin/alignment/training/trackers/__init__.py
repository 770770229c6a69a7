"""Trackers: each is one file and one line here. transformers knows more, which report a training alone, without a group."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from spin.alignment.core.errors import InputError, shown
from spin.alignment.training.trackers.base import TrackedRun, Tracker
from spin.alignment.training.trackers.mlflow import MLflow
from spin.alignment.training.trackers.tensorboard import TensorBoard
from spin.alignment.training.trackers.trackio import Trackio
from spin.alignment.training.trackers.wandb import WandB

TRACKERS: dict[str, Tracker] = {
    "tensorboard": TensorBoard(),
    "wandb": WandB(),
    "mlflow": MLflow(),
    "trackio": Trackio(),
}


def missing_package(name: str) -> str:
    """Return the command that installs what a tracker of this table needs; empty if it is installed."""
    tracker = TRACKERS[name]
    return "" if importlib.util.find_spec(tracker.module) else f"pip install {' '.join(tracker.packages)}"


def check_run_trackers(names: Sequence[str], source: str) -> None:
    """Check the trackers of a self-play run.

    Raises:
        InputError: one is unknown, or its package is missing; the message has the command that installs it.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(
                f"'report_to' in {source} names {shown(name)}: choose some of {', '.join(TRACKERS)} (in the section of a "
                "training, any tracker of transformers)"
            )
        if command := missing_package(name):
            raise InputError(f"'report_to' in {source} names {name}, whose package is missing: {command}, or remove it")


__all__ = ["TRACKERS", "TrackedRun", "Tracker", "check_run_trackers", "missing_package"]
