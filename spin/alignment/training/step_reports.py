"""The callback that reports the live step of a training; see :mod:`spin.alignment.training.live_step`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from spin.alignment.core.machine import peak_memory
from spin.alignment.training.live_step import LiveStep, write_live_step

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from spin.alignment.training.watched_steps import WatchedSteps

_REPORT_SECONDS = 1.0


class StepReports(TrainerCallback):
    """Writes the step, speed and time left to the output folder, at most once a second; only in the main process."""

    def __init__(self, trainer: WatchedSteps, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._logged: dict[str, float] = {}
        self._reported = -math.inf
        self._is_warm = False
        self._since = (0.0, 0, 0.0)  # time, step and tokens from which the speed is measured

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._measure_from(state)
        if state.is_world_process_zero:
            write_live_step(self.folder, LiveStep(state.global_step, state.max_steps, memory=peak_memory()))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        found = {name: (logs or {}).get(name) for name in ("loss", "rewards/margins")}
        self._logged |= {name: float(value) for name, value in found.items() if value is not None}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if not state.is_world_process_zero or now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        started, first, tokens = self._since
        per_step = (now - started) / max(1, state.global_step - first)
        live = LiveStep(
            step=state.global_step,
            steps=state.max_steps,
            loss=self._logged.get("loss"),
            margin=self._logged.get("rewards/margins"),
            tokens_per_second=round((self.trainer.sums["tokens"] - tokens) / max(now - started, 1e-9), 1),
            seconds_left=round(per_step * (state.max_steps - state.global_step), 1),
            memory=peak_memory(),
        )
        write_live_step(self.folder, live)
        if not self._is_warm:
            # The first step includes what happens only once (kernels, allocations), so the speed is measured after it.
            self._is_warm = True
            self._measure_from(state)

    def _measure_from(self, state: TrainerState) -> None:
        self._since = (time.monotonic(), state.global_step, self.trainer.sums["tokens"])
