"""Trackio: the runs of a project, in its local database or on a Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.training.trackers.base import STEP_AXIS, TrackedRun, Tracker


class Trackio(Tracker):
    packages = ("trackio",)
    module = "trackio"

    def variables(self, run: TrackedRun) -> dict[str, str]:
        return {}

    def configure(self, run: TrackedRun, arguments: Any) -> None:
        # Trackio continues the run of the same name in the same project, so the project is what belongs together.
        arguments.project = run.shared_name

    def open(self, run: TrackedRun) -> Any:
        from accelerate.tracking import TrackioTracker

        tracker = TrackioTracker(run.shared_name, name=run.title, resume="allow", embed=False)
        tracker.start()
        return tracker

    def log(self, opened: Any, values: Mapping[str, float], step: int) -> None:
        opened.log({**values, STEP_AXIS: step})

    def table(self, opened: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        import pandas
        import trackio

        frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns))
        opened.log({name: trackio.Table(dataframe=frame), STEP_AXIS: step})
