"""What every trainer watches: that losses, log-probs and gradients stay finite, and the sums of the whole run across resumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from spin.alignment.core.content_hash import begin_hashes, write_hashes
from spin.alignment.core.errors import NotFiniteError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.training.failed_step import FailedStep, write_failed_step

SUMS_FILE = "run_sums.json"
# fp16 training begins with a loss scale that overflows, and halves it after each step that did: 2**16 becomes 1 in 16 steps.
_OVERFLOWS_ALLOWED = 20


def are_sums(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a checkpoint's ``run_sums.json`` is what was written there: finite numbers only."""
    return all(type(value) in (int, float) and math.isfinite(value) for value in content.values())


class WatchedSteps(Trainer):
    """A Trainer that stops before a number that is not finite is used, with the rows that caused it saved (``failed-step-N``).

    It also keeps :attr:`sums` over all steps of the run: ``loss`` (the sum of the steps' losses), ``rows``, ``tokens`` and
    ``completion_tokens`` trained in all processes. They are written to every checkpoint and read when the run resumes from it.
    """

    kind = "pairs"  # of the rows in a failed step

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sums: dict[str, float] = {"loss": 0.0, "rows": 0, "tokens": 0, "completion_tokens": 0}
        self._step_rows: Sequence[Mapping[str, Any]] = []
        self._overflows = 0

    def train(self, resume_from_checkpoint: Any = None, **settings: Any) -> Any:
        """Train; see ``transformers.Trainer.train``.

        Raises:
            NotFiniteError: a loss, log-prob or gradient is not finite; the rows are saved in ``output_dir``.
        """
        if resume_from_checkpoint:
            self.read_sums(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def read_sums(self, checkpoint: Path) -> None:
        """Continue the sums of a checkpoint; one of an earlier version has none."""
        if (checkpoint / SUMS_FILE).is_file():
            self.sums |= read_json(checkpoint / SUMS_FILE)

    def _run_epoch(self, *arguments: Any, **settings: Any) -> None:
        """Run an epoch, unless all steps are done: the Trainer would take one more after a resume from its last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **settings)

    @staticmethod
    def tokens_of(rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of tokens of the rows: prompts and responses."""
        return sum(len(value) for row in rows for name, value in row.items() if name.endswith("_ids"))

    def completion_tokens_of(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of tokens of the rows' responses."""
        return sum(
            len(value) for row in rows for name, value in row.items() if name.endswith("_ids") and name != "prompt_ids"
        )

    def begin_step(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count the rows that this process is about to train on, and their tokens. Every process must call it."""
        self._step_rows = rows
        counts = torch.tensor(
            [len(rows), self.tokens_of(rows), self.completion_tokens_of(rows)], device=self.args.device
        )
        found = self.accelerator.reduce(counts, reduction="sum").tolist()
        for name, count in zip(("rows", "tokens", "completion_tokens"), found, strict=True):
            self.sums[name] += count

    def end_step(self, loss: torch.Tensor) -> torch.Tensor:
        """Add the loss of an optimiser step, as the Trainer counts it, to the sums, and return it."""
        self.sums["loss"] += loss.item()
        return loss

    def check_finite(self, what: str, value: float, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Stop if ``value`` is not finite. ``rows`` caused it (default: any of the step's).

        Raises:
            NotFiniteError: it is not; the step's rows are saved.
        """
        if math.isfinite(value):
            return
        raise self.failed(f"{what} is {value}", rows)

    def failed(
        self,
        what: str,
        rows: Sequence[Mapping[str, Any]] | None = None,
        step: int | None = None,
        kind: str = "",
        exact: bool = True,
    ) -> NotFiniteError:
        """Save the rows that caused it (default: all of this process's step) and return the error that names them.

        ``step`` and ``kind`` are those of :class:`FailedStep` (default: the present step, this trainer's rows); not ``exact``:
        one of the rows caused it.
        """
        saved = list(self._step_rows) if rows is None else list(rows)
        record = FailedStep(
            step=self.state.global_step + 1 if step is None else step,
            what=what,
            kind=kind or self.kind,
            model=str(getattr(self.accelerator.unwrap_model(self.model).config, "_name_or_path", "")),
            settings=settings_of_step(self.args),
            named=rows is not None and exact,
        )
        folder = write_failed_step(Path(self.args.output_dir), record, saved, self.accelerator.process_index)
        return NotFiniteError(record.sentence(saved, folder), saved)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm) if norm is not None else 0.0
        self._overflows = 0 if math.isfinite(value) else self._overflows + 1
        if not self.args.fp16 or self._overflows > _OVERFLOWS_ALLOWED:
            self.check_finite("the gradient norm", value)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint with the hashes of its files, and delete older ones only then: killed at any moment, the run has a
        whole one to resume from."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_hashes(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # until every process has written its part
        if self.args.should_save:
            write_hashes(folder)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint's model, unless it is not finite, and the sums of the run so far."""
        if not _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        for name, weight in itertools.chain(self.model.named_parameters(), self.model.named_buffers()):
            if weight.is_floating_point() and not torch.isfinite(_local(weight)).all():
                raise self.failed(f"the weight {name} is not finite after the update")
        super().save_model(output_dir, _internal_call)
        sums = self.totals() | {"loss": self.mean_over_processes(self.sums["loss"])}
        if output_dir and self.args.should_save:
            write_json_atomic(Path(output_dir) / SUMS_FILE, sums)

    def mean_over_processes(self, value: float) -> float:
        """Return the mean of a number of each process. Every process must call it."""
        if self.accelerator.num_processes == 1:
            return value
        values = self.accelerator.gather(torch.tensor([value], dtype=torch.float32, device=self.args.device))
        return float(values.double().mean())

    def totals(self) -> dict[str, float]:
        """Return the sums of the whole run, with the number of its steps."""
        return {**self.sums, "steps": self.state.global_step}

    def mean_loss(self) -> float:
        """Return the mean loss over all steps of the run, those before a resume included. Every process must call it."""
        return self.mean_over_processes(self.sums["loss"]) / max(1, self.state.global_step)


def _local(weight: torch.Tensor) -> torch.Tensor:
    """Return the part of a sharded weight that is in this process."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def settings_of_step(arguments: Any) -> dict[str, Any]:
    """Return the settings that a step's loss depends on: those this project declares, none of which is a secret."""
    from spin.alignment.core.settings import settings_of

    names = [*settings_of(type(arguments)), "bf16", "fp16", "max_grad_norm", "loss_arguments"]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
