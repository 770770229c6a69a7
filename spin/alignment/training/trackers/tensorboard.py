"""TensorBoard: event files in one folder per run, shown together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.training.trackers.base import TrackedRun, Tracker, markdown_table


class TensorBoard(Tracker):
    packages = ("tensorboard",)
    module = "tensorboard"

    def variables(self, run: TrackedRun) -> dict[str, str]:
        # A resumed training adds a file of events to the same folder, which is the same run.
        return {"TENSORBOARD_LOGGING_DIR": str(run.folder / "tensorboard" / run.name)}

    def open(self, run: TrackedRun) -> Any:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker(run.name, run.folder / "tensorboard")
        tracker.start()
        return tracker

    def table(self, opened: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        opened.log({name: markdown_table(columns, rows)}, step=step)
