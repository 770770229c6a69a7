"""Reports a training to its trackers: as one run of a group, on an axis shared with other trainings, and each step once."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.training.trackers import TRACKERS, TrackedRun
from spin.alignment.training.trackers.base import missing_variables, read_record, tracked_key, write_record

if TYPE_CHECKING:
    from spin.alignment.training.settings import Settings

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_") and name != "on_log"]


class Reports(TrainerCallback):
    """Passes the events of a training to the callbacks of its trackers, with ``offset`` added to the steps of logs.

    A training that resumes takes the steps after its last checkpoint again; what an earlier attempt has logged of them is the
    same, and is not logged again. A tracker that fails during the training is left out from then on, which is said.
    """

    def __init__(self, callbacks: dict[str, Any], settings: Settings) -> None:
        self.callbacks, self.folder, self.offset = callbacks, settings.output_dir, settings.output.tracker_step
        self._logged = dict(read_record(self.folder).get("logged", {}))
        self._logged_before = dict(self._logged)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if not state.is_world_process_zero:
            return
        kind = log_kind(logs or {})
        if state.global_step <= self._logged_before.get(kind, -1):
            return
        shifted = copy.copy(state)  # of the checkpoint, which keeps the steps of the training itself
        shifted.global_step = state.global_step + self.offset
        self.pass_on("on_log", args, shifted, control, logs=logs, **others)
        self._logged[kind] = state.global_step
        with contextlib.suppress(OSError):  # a full disk: at worst, a later attempt logs some steps again
            write_record(self.folder, {**read_record(self.folder), "logged": self._logged})

    def pass_on(self, event: str, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Call the callback of every tracker.

        Raises:
            InputError: a tracker cannot start.
        """
        for name, callback in list(self.callbacks.items()):
            try:
                getattr(callback, event)(args, state, control, **others)
            except Exception as error:
                if event == "on_train_begin":
                    raise InputError(
                        f"the tracker {name} cannot start ({reason_of(error)}): correct its settings, or remove it from report_to"
                    ) from error
                say_error(f"warning: the tracker {name} failed ({reason_of(error)}): the training goes on without it")
                del self.callbacks[name]


def _passing(event: str) -> Any:
    def handle(self: Reports, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.pass_on(event, args, state, control, **others)

    return handle


for _event in _EVENTS:
    setattr(Reports, _event, _passing(_event))


def log_kind(logs: dict[str, Any]) -> str:
    """Return which of the logs of a step it is: those of training, of an evaluation, and the summary at the end."""
    if any(name.startswith("eval_") for name in logs):
        return "eval"
    return "summary" if "train_runtime" in logs else "train"


@contextlib.contextmanager
def tracked(settings: Settings) -> Iterator[None]:
    """Within this block, transformers' callbacks report to the training's own run of each tracker.

    The Trainer must be created inside, and given to :func:`attach_trackers`.
    """
    arguments = settings.arguments
    trackers = {name: TRACKERS[name] for name in arguments.report_to if name in TRACKERS}
    if arguments.process_index != 0 or not trackers:
        yield
        return
    run, failed = tracked_run(settings), True
    added: dict[str, str] = {}
    try:
        for name, tracker in trackers.items():
            try:
                added |= missing_variables(tracker.variables(run))
            except Exception as error:  # a server that cannot be reached
                raise InputError(
                    f"the tracker {name} cannot start ({reason_of(error)}): correct its settings, or remove it from report_to"
                ) from error
            tracker.configure(run, arguments)
        arguments.run_name = run.title
        os.environ.update(added)
        yield
        failed = False
    finally:
        for tracker in trackers.values():
            tracker.close(failed)
        for name in added:
            os.environ.pop(name, None)


def tracked_run(settings: Settings) -> TrackedRun:
    """Return the run of the trackers that a training is, the same after a resume."""
    output, folder = settings.output, settings.output_dir
    name = settings.arguments.run_name or folder.resolve().name
    local = folder / "trackers" if output.tracker_dir is None else Path(output.tracker_dir)
    return TrackedRun(output.tracker_group, name, tracked_key(folder), local)


def attach_trackers(trainer: Any, settings: Settings) -> None:
    """Put :class:`Reports` between a Trainer and the callbacks of its trackers."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    found = {name: trainer.pop_callback(INTEGRATION_TO_CALLBACK[name]) for name in settings.arguments.report_to}
    callbacks = {name: callback for name, callback in found.items() if callback is not None}
    if callbacks:
        trainer.add_callback(Reports(callbacks, settings))
