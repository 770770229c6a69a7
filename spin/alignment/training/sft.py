"""SFT on the ground truth: the settings, data and record of a training by :class:`GroundTruthTrainer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spin.alignment.core.cards import TAG
from spin.alignment.core.provenance import hash_file
from spin.alignment.models.folder import check_fits
from spin.alignment.models.precision import prepare_precision
from spin.alignment.training.accounting import accounting
from spin.alignment.training.described import Described, describe_function
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings, check_evaluation
from spin.alignment.training.sft_config import SFTArguments
from spin.alignment.training.sft_data import CONTENT, check_experts, check_row_lengths, load_ground_truth
from spin.alignment.training.sft_objectives import OBJECTIVES
from spin.alignment.training.sft_trainer import GroundTruthTrainer
from spin.alignment.training.token_means import NAMES

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder


class SFTTraining(TrainingProgram):
    """Fine-tunes on the ground truth, from a model or (``init_from_config``) from random weights."""

    script = "run_sft.py"
    arguments_class = SFTArguments
    defaults: ClassVar[Mapping[str, Any]] = {"dataset_splits": ["train"]}

    def check_settings(self, settings: Settings) -> None:
        """Check that there is a test split if evaluation is requested."""
        check_evaluation(settings, "test")

    def held_out_metrics(self, arguments: Any) -> list[str]:
        """Return the means over held-out response tokens."""
        return list(NAMES)

    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Load, mix and encode the prompts with their ground truth; dropped rows are counted by reason."""
        data = TrainingData.of(load_ground_truth(settings, encoder))
        dropped = sum((account.dropped for account in data.accounts.values()), Counter[str]())
        return replace(data, dropped=dict(dropped))

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a line per split with its number of rows; the first also counts the dropped rows of all splits."""
        dropped = f", dropped {data.dropped}" if data.dropped else ""
        return [
            f"{split}: {number} rows{dropped if split == 'train' else ''}" for split, number in data.sizes().items()
        ]

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:
        """Check that every row fits into the model's context and vocabulary, and into a micro-batch."""
        for split, rows in data.splits.items():
            length, largest = check_row_lengths(rows, split, settings.arguments.max_tokens_per_batch)
            check_fits(model_folder, length, largest)
        check_experts(model_folder, settings.arguments.router_aux_loss_coef)

    def model_key(self, settings: Settings, model_folder: Path) -> str:
        """Return a hash of the weights, or of the model configuration if training starts from random weights."""
        if settings.model.init_from_config:
            return hash_file(model_folder / "config.json")
        return super().model_key(settings, model_folder)

    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of the ids and labels."""
        return job.data.hashes["train"][CONTENT]

    def describe(self, settings: Settings) -> Described:
        """Return the loss with its formula."""
        loss = settings.arguments.loss_type
        return Described(
            title="Model fine-tuned on the ground truth",
            tags=(TAG, "sft"),
            method=(
                "Supervised fine-tuning on the ground-truth responses; the loss is averaged over their tokens.",
                f"Loss per token {describe_function(loss, OBJECTIVES[loss].token_losses)}",
            ),
            limits=("The model imitates its data, including their mistakes.",),
        )

    def make_trainer(self, job: TrainingJob, model: Any) -> GroundTruthTrainer:
        """Return the trainer for the encoded rows."""
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
