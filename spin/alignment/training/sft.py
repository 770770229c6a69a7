"""SFT on the ground truth: TRL's SFTTrainer with this project's defaults and rows that are already tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from trl import SFTConfig, SFTTrainer

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_file, hash_json
from spin.alignment.core.settings import check_settings
from spin.alignment.models.folder import check_fits
from spin.alignment.models.precision import prepare_precision
from spin.alignment.training.accounting import accounting
from spin.alignment.training.keys import SFTKeys
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings
from spin.alignment.training.sft_data import load_ground_truth
from spin.alignment.training.watched_steps import WatchedSteps

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder


@dataclass
class SFTArguments(SFTKeys, SFTConfig):
    """Every key of TRL's SFTConfig, with the defaults of :class:`SFTKeys`."""

    dataset_kwargs: dict[str, Any] | None = None
    max_length: int | None = 1024

    def __post_init__(self) -> None:
        check_settings(self)
        if self.packing or self.completion_only_loss is False or self.assistant_only_loss:
            raise InputError(
                "packing, completion_only_loss and assistant_only_loss are controlled by run_sft.py: remove the key"
            )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class GroundTruthTrainer(WatchedSteps, SFTTrainer):
    """SFTTrainer with label smoothing in one forward pass: TRL's own runs a second one for its metrics."""

    kind = "sft"

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
        loss = self.label_smoother(outputs, inputs["labels"], shift_labels=True, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # tokens are summed over all processes, but gradients are averaged
        return (loss, outputs) if return_outputs else loss


def rows_of(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return the rows of a padded batch, without padding: ``input_ids`` and ``labels`` (-100 on the prompt)."""
    keep = inputs["attention_mask"].bool()
    return [
        {"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], keep, strict=True)
    ]


class SFTTraining(TrainingProgram):
    """Fine-tunes on the ground truth, from a model or (``init_from_config``) from random weights."""

    arguments_class = SFTArguments
    defaults: ClassVar[Mapping[str, Any]] = {"dataset_splits": ["train"]}

    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Load, mix and encode the prompts with their ground truth; dropped rows are counted by reason."""
        splits, accounts = load_ground_truth(settings, encoder)
        dropped = sum((account.dropped for account in accounts.values()), Counter[str]())
        return TrainingData(splits, dict(dropped), accounts)

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a line per split with its number of rows; the first also counts the dropped rows of all splits."""
        dropped = f", dropped {data.dropped}" if data.dropped else ""
        return [
            f"{split}: {number} rows{dropped if split == 'train' else ''}" for split, number in data.sizes().items()
        ]

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:
        """Check that every row fits into the model's context and vocabulary."""
        rows = [ids for split in data.splits.values() for ids in split["input_ids"]]
        check_fits(model_folder, max(map(len, rows)), max(map(max, rows)))

    def model_key(self, settings: Settings, model_folder: Path) -> str:
        """Return a hash of the weights, or of the model configuration if training starts from random weights."""
        if settings.model.init_from_config:
            return hash_file(model_folder / "config.json")
        return super().model_key(settings, model_folder)

    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of the ids and labels."""
        return hash_json({split: [rows["input_ids"], rows["labels"]] for split, rows in job.data.splits.items()})

    def make_trainer(self, job: TrainingJob, model: Any) -> GroundTruthTrainer:
        """Return TRL's trainer for the encoded rows."""
        prepare_precision(model, job.settings.arguments)
        return GroundTruthTrainer(
            model=model,
            args=job.settings.arguments,
            train_dataset=job.data.splits["train"],
            eval_dataset=job.data.splits.get("test"),
            processing_class=job.encoder.tokenizer,
        )

    def metrics(self, job: TrainingJob, trainer: GroundTruthTrainer, result: Any) -> dict[str, Any]:
        """Return the numbers of rows."""
        return {
            "rows": job.data.sizes(),
            "dropped": job.data.dropped,
            "accounting": accounting(job.data.accounts, trainer.totals()),
        }
