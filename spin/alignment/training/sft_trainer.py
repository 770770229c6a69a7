"""TRL's SFTTrainer with the project's label smoothing and held-out numbers: every row and every token counts once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from spin.alignment.training.filler_rows import EachRowOnce, FillerRow
from spin.alignment.training.watched_steps import WatchedSteps


class GroundTruthTrainer(EachRowOnce, WatchedSteps, SFTTrainer):
    """SFTTrainer with label smoothing in one forward pass: TRL's own runs a second one for its metrics.

    Held-out metrics are means over all response tokens, whatever the batch size and the number of processes.
    """

    data_collator: Any
    kind = "sft"

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        with warnings.catch_warnings():
            # It announces the slower smoothing of TRL, which is not used here, and its end.
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
            super().__init__(*arguments, **settings)
        self.data_collator = without_fillers(self.data_collator)
        # Of the evaluation under way: for each batch, the sum of the losses of its tokens (nats) in this process and their
        # number, and the number in all processes.
        self._held_out: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def train(self, resume_from_checkpoint: Any = None, **settings: Any) -> Any:
        """Train; see :meth:`WatchedSteps.train`. TRL's count of tokens continues after a resume."""
        if resume_from_checkpoint:
            self.read_sums(Path(resume_from_checkpoint))
            self._total_train_tokens = int(self.sums["tokens"])
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def completion_tokens_of(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of tokens that the rows are trained to predict."""
        return sum(label != -100 for row in rows for label in row["labels"])

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a step's forward and backward passes on rows of ``(B, T)`` tokens."""
        self.begin_step(rows_of(inputs))
        return self.end_step(super().training_step(model, inputs, num_items_in_batch))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return :meth:`smoothed_loss`.

        Raises:
            NotFiniteError: it is not finite; the rows are saved.
        """
        found = self.smoothed_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        if not torch.isfinite(loss):
            raise self.failed(f"the loss is {loss.item()}", rows_of(inputs), exact=False)
        return found

    def smoothed_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean over the response tokens of (1 - e) * NLL + e * (mean over the vocabulary of -log p), in nats."""
        if self.label_smoother is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        if num_items_in_batch is None:
            num_items_in_batch = response_tokens(inputs["labels"]).clamp(min=1)
            processes = 1
        else:
            # Tokens are summed over all processes, but gradients are averaged.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = self.label_smoother(outputs, inputs["labels"], shift_labels=True, num_items_in_batch=num_items_in_batch)
        loss = loss * processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Return the loss of a batch as TRL does, and keep its sum for the mean over all batches."""
        tokens = response_tokens(inputs["labels"]).to(self.args.device)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        everywhere = self.accelerator.reduce(tokens.double(), reduction="sum")
        self._held_out.append((result[0].detach().double() * tokens, tokens.double(), everywhere))
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; held-out means are over tokens, not over batches."""
        if self._held_out and any(name.startswith("eval_") for name in logs):
            sums, tokens, everywhere = (torch.stack(values) for values in zip(*self._held_out, strict=True))
            self._held_out.clear()
            total = self.accelerator.reduce(torch.stack([sums.sum(), tokens.sum()]), reduction="sum")
            logs["eval_loss"] = (total[0] / total[1].clamp(min=1)).item()
            for name, values in self._metrics["eval"].items():
                if len(values) == len(everywhere):  # means over the tokens of one batch each
                    weighted = (
                        torch.tensor(values, dtype=torch.float64) * everywhere.cpu()
                    ).sum() / everywhere.sum().cpu()
                    self._metrics["eval"][name] = [weighted.item()]
        super().log(logs, start_time)


def rows_of(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return the rows of a padded batch, without padding and fillers: ``input_ids`` and ``labels`` (-100 on the prompt)."""
    keep = inputs["attention_mask"].bool()
    rows = zip(inputs["input_ids"], inputs["labels"], keep, strict=True)
    return [
        {"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}
        for ids, labels, mask in rows
        if (labels != -100).any()
    ]


def response_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of ``labels`` (B, T) are predicted: those that are not -100, the first position excluded."""
    return (labels[:, 1:] != -100).sum()


def without_fillers(collate: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """Return a collator that gives the rows of :class:`FillerRow` no response tokens, so that they count nowhere."""

    def collate_real(rows: Sequence[Any]) -> Any:
        return collate(
            [
                row.row | {"labels": [-100] * len(row.row["labels"])} if isinstance(row, FillerRow) else row
                for row in rows
            ]
        )

    return collate_real
