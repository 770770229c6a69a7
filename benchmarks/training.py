"""Shared by the contenders that use transformers' Trainer: its settings, and the callback that takes turns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns

PAIR_RECORDS = {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected"}
OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}


def common_arguments(job: Job) -> dict[str, Any]:
    """Return the settings of TrainingArguments that all contenders train with."""
    return {
        "output_dir": str(Path(job.folder) / "output"),
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": OPTIMIZERS[job.optimizer],
        "beta": job.beta,
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device == "cuda",
        "train_sampling_strategy": "sequential",  # the pairs are already shuffled or grouped by the plan of the run
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class TurnCallback(TrainerCallback):
    """Runs a Trainer one turn after the other, and records metrics of every step: ``records`` maps their names to those logged.

    A measured turn lasts from the end of one optimiser step to the end of another: fetching data, the Trainer's overhead and
    the steps. If training begins with a reference pass, that is the first turn.
    """

    def __init__(
        self, job: Job, turns: Turns, reference_on_train_begin: bool, records: Mapping[str, str] = PAIR_RECORDS
    ) -> None:
        self.job, self.turns, self.records = job, turns, records
        self.reference_on_train_begin = reference_on_train_begin

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.reference_on_train_begin:
            self.turns.begin()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.turns.end_if_begun()
        self.turns.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ends = self.job.turn_ends
        if state.global_step in ends:
            self.turns.end()
            if state.global_step != ends[-1]:
                self.turns.begin()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.turns.records.append({name: float(logs[key]) for name, key in self.records.items()})
