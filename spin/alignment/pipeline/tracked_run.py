"""A self-play run in its trackers: its trainings as one group on one axis of steps, and the results of its stages."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import read_json
from spin.alignment.training.trackers import TRACKERS, TrackedRun
from spin.alignment.training.trackers.base import tracked_key

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.stages.base import Model, Stage

_NONE: tuple[Any, ...] = (None, "none", [], ["none"])
_TABLE = "responses"


def tracker_values(config: RunConfig, model: Model, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with which the training of ``model`` (with the keys ``values``) reports to the trackers of the run."""
    names = values.get("report_to", run_trackers(config))
    if names in _NONE:
        return {}
    run_dir = Path(config.run_dir)
    return {
        "report_to": names,
        "run_name": values.get("run_name") or str(model.folder.relative_to(run_dir)).replace("/", "-"),
        "tracker_group": group_of(run_dir),
        "tracker_dir": str(run_dir / "trackers"),
        "tracker_step": steps_before(run_dir, model.iteration or 0),
    }


def run_trackers(config: RunConfig) -> list[str]:
    """Return the trackers of the whole run: those of its own key ``report_to``, which may be a single name."""
    names = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    return [] if names in _NONE else list(names)


def group_of(run_dir: Path) -> str:
    """Return the name of the group: that of the run's folder, and a few characters that no other run has."""
    return f"{run_dir.resolve().name}-{tracked_key(run_dir)[:6]}"


def steps_before(run_dir: Path, iteration: int) -> int:
    """Return the number of optimiser steps of the iterations before one: where its training starts on the common axis."""
    found = (read_json(run_dir / f"iter{number}" / "metrics.json") for number in range(iteration))
    return sum(int(metrics["steps"]) for metrics in found)


class RunTrackers:
    """Context manager: the trackers of a run's own key ``report_to``, which get what each stage measured as it finishes.

    Safe to use from several threads. A tracker that fails is left out from then on, which is said.
    """

    def __init__(self, config: RunConfig) -> None:
        self.run_dir, self.names = Path(config.run_dir), run_trackers(config)
        self._opened: dict[str, Any] | None = None
        self._mutex = threading.Lock()

    def __enter__(self) -> RunTrackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._opened or {}):
            self._attempt(name, lambda opened: opened.finish())

    def open(self) -> None:
        """Create the run ``stages`` of each tracker, or continue it; done once, when the first stage starts.

        Raises:
            InputError: a tracker cannot start.
        """
        with self._mutex:
            if self._opened is not None or not self.names:
                return
            from accelerate import PartialState

            PartialState()  # accelerate's trackers ask it which process they are in
            self._opened = {}
            run = TrackedRun(group_of(self.run_dir), "stages", tracked_key(self.run_dir), self.run_dir / "trackers")
            for name in self.names:
                try:
                    self._opened[name] = TRACKERS[name].open(run)
                except Exception as error:  # each library has errors of its own
                    raise InputError(
                        f"the tracker {name} cannot start ({reason_of(error)}): correct its settings, or remove it from report_to"
                    ) from error

    def report(self, stage: Stage, seconds: float) -> None:
        """Report what a stage measured, at the number of steps that its model was trained for."""
        if not self._opened:
            return
        model = stage.makes or stage.scores
        is_main = model is None or model.role in ("start", "policy")
        prefix = stage.name.rpartition("/")[2] if is_main else stage.name
        trained = (stage.iteration or 0) + (stage.iteration is not None and model is not None)
        step = steps_before(self.run_dir, trained)
        measured = {"seconds": seconds, **stage.kind.numbers(stage, max(seconds, 1e-9))}
        values = {f"{prefix}/{name}": float(value) for name, value in measured.items()}
        examples = [{"stage": stage.name, **row} for row in stage.kind.examples(stage)]
        columns, rows = list(examples[0]) if examples else [], [list(row.values()) for row in examples]
        with self._mutex:
            for name in list(self._opened):
                self._attempt(name, lambda opened, name=name: TRACKERS[name].log(opened, values, step))
                if examples:
                    self._attempt(
                        name, lambda opened, name=name: TRACKERS[name].table(opened, _TABLE, columns, rows, step)
                    )

    def _attempt(self, name: str, act: Any) -> None:
        assert self._opened is not None
        if name not in self._opened:
            return
        try:
            act(self._opened[name])
        except Exception as error:  # each library has errors of its own
            say_error(f"warning: the tracker {name} failed ({reason_of(error)}): the run goes on without it")
            del self._opened[name]
