"""SFT on the ground truth: TRL's SFTTrainer with this project's defaults and rows that are already tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trl import SFTConfig

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_file, hash_json
from spin.alignment.core.settings import check_settings
from spin.alignment.models.folder import check_fits
from spin.alignment.models.precision import prepare_precision
from spin.alignment.training.accounting import accounting
from spin.alignment.training.keys import SFTKeys
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings, check_evaluation
from spin.alignment.training.sft_data import load_ground_truth
from spin.alignment.training.sft_trainer import GroundTruthTrainer

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

# TRL's keys for loading a model and encoding rows, which this program does itself, with the values they have if they are not set.
_NOT_USED = {
    "model_init_kwargs": None,
    "dataset_kwargs": None,
    "dataset_text_field": "text",
    "eval_packing": None,
    "eos_token": None,
    "pad_token": None,
}


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
        for name, default in _NOT_USED.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, but run_sft.py loads the model and encodes the rows "
                    "itself, with the tokens of its tokenizer: remove the key"
                )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class SFTTraining(TrainingProgram):
    """Fine-tunes on the ground truth, from a model or (``init_from_config``) from random weights."""

    arguments_class = SFTArguments
    defaults: ClassVar[Mapping[str, Any]] = {"dataset_splits": ["train"]}

    def check_settings(self, settings: Settings) -> None:
        """Check that there is a test split if evaluation is requested."""
        check_evaluation(settings, "test")

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
        for rows in data.splits.values():
            lengths, largest = zip(*((len(ids), max(ids)) for ids in rows["input_ids"]), strict=True)
            check_fits(model_folder, max(lengths), max(largest))

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
