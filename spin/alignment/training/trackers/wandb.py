"""Weights & Biases: the runs of a group, online or with ``WANDB_MODE=offline``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.training.trackers.base import STEP_AXIS, TrackedRun, Tracker

_PROJECT = "selfplay-spin"


class WandB(Tracker):
    packages = ("wandb",)
    module = "wandb"

    def variables(self, run: TrackedRun) -> dict[str, str]:
        run.folder.mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere, with a warning
        return {
            "WANDB_PROJECT": _PROJECT,
            "WANDB_RUN_GROUP": run.group,
            "WANDB_TAGS": run.name,
            "WANDB_RUN_ID": run.key,
            "WANDB_RESUME": "allow",
            "WANDB_DIR": str(run.folder),
            "WANDB_SILENT": "true",
        }

    def close(self, failed: bool) -> None:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))

    def open(self, run: TrackedRun) -> Any:
        from accelerate.tracking import WandBTracker

        run.folder.mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", _PROJECT),
            group=os.environ.get("WANDB_RUN_GROUP", run.group),
            name=run.title,
            tags=[run.name],
            id=run.key,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            settings={"silent": True, "console": "off"},
        )
        tracker.start()
        tracker.tracker.define_metric(STEP_AXIS)
        tracker.tracker.define_metric("*", step_metric=STEP_AXIS, step_sync=True)
        return tracker

    def log(self, opened: Any, values: Mapping[str, float], step: int) -> None:
        opened.log({**values, STEP_AXIS: step})

    def table(self, opened: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        opened.log_table(name, columns=list(columns), data=[list(row) for row in rows])
