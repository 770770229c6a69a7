"""Preference training on stored pairs: SPIN and related methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.cards import TAG
from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.data.preferences import provenance_of
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.models.folder import check_fits
from spin.alignment.training.accounting import accounting
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.described import Described, describe_function
from spin.alignment.training.first_loss import read_first_loss
from spin.alignment.training.metrics import metric_names
from spin.alignment.training.moving_reference import check_can_exchange
from spin.alignment.training.preference_data import TOKENS, check_budget, joined_key, largest, load_pairs
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings, check_evaluation
from spin.alignment.training.trainer import SPINTrainer

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder


class PreferenceTraining(TrainingProgram):
    """Trains a policy on preference pairs, with the initial model as the reference."""

    script = "run_spin.py"
    arguments_class = SPINConfig

    def check_settings(self, settings: Settings) -> None:
        """Check that training starts from a trained model, and that there is a test split if evaluation is requested."""
        if settings.model.init_from_config:
            raise InputError(
                "init_from_config cannot be used here (self-play needs a trained opponent): use spin/run_sft.py"
            )
        check_evaluation(settings, "test_prefs")
        if settings.arguments.alpha:
            check_can_exchange(settings.arguments, "alpha")

    def held_out_metrics(self, arguments: Any) -> list[str]:
        """Return the averages over held-out pairs."""
        return metric_names(arguments.loss)

    def load_data(self, settings: Settings, encoder: ChatEncoder) -> TrainingData:
        """Load, mix and encode the pairs; dropped pairs are counted by split and reason."""
        return TrainingData.of(load_pairs(settings, encoder))

    def describe_data(self, data: TrainingData) -> list[str]:
        """Return a line per split with the number of pairs, and of dropped pairs by reason."""
        lines = []
        for split, number in data.sizes().items():
            reasons = "".join(f", {count} dropped: {reason}" for reason, count in data.dropped[split].items())
            lines.append(f"{split}: {number} pairs{reasons}")
        return lines

    def check_data(self, settings: Settings, data: TrainingData, model_folder: Path) -> None:
        """Check that every pair fits into the model's context and vocabulary, and into a micro-batch."""
        check_fits(model_folder, *largest(data.splits))
        check_budget(data.splits, settings.arguments)

    def model_key(self, settings: Settings, model_folder: Path) -> str:
        """Return a hash of the weights, with a suffix if they are quantised: those give other log-probs."""
        bits = "-4bit" if settings.model.load_in_4bit else "-8bit" if settings.model.load_in_8bit else ""
        return super().model_key(settings, model_folder) + bits

    def data_key(self, job: TrainingJob) -> str:
        """Return a hash of the encoded pairs."""
        return joined_key(job.data.hashes)

    def describe(self, settings: Settings) -> Described:
        """Return the loss with its source and formula, and what it is measured against."""
        arguments = settings.arguments
        reference = (
            "The reference of the loss is the model that training starts from, frozen."
            if arguments.loss.needs_reference
            else "The loss needs no reference model."
        )
        return Described(
            title="Policy trained on preference pairs",
            tags=(TAG, "self-play", "preference-optimization", arguments.loss_type.partition(":")[0]),
            method=(
                f"Loss {describe_function(arguments.loss_type, arguments.loss.function)}",
                f"{reference} beta = {arguments.beta:g}.",
            ),
            limits=(
                "The model prefers what its pairs prefer: their ground truth, or their scorer, bounds its quality.",
            ),
        )

    def make_trainer(self, job: TrainingJob, model: Any) -> SPINTrainer:
        """Return the trainer; the policy's initial weights are its reference."""
        remark = other_generators(job.settings, job.model_key)
        if remark and job.settings.arguments.process_index == 0:
            say_error(remark)
        hashes = job.data.hashes
        pairs = {split: PairDataset(rows, hashes[split][TOKENS]) for split, rows in job.data.splits.items()}
        return SPINTrainer(
            model=model,
            args=job.settings.arguments,
            train_dataset=pairs["train"],
            eval_dataset=pairs.get("test"),
            processing_class=job.encoder.tokenizer,
            reference_hash=job.model_key,
        )

    def metrics(self, job: TrainingJob, trainer: SPINTrainer, result: Any) -> dict[str, Any]:
        """Return the first loss, timings and throughput, and the numbers of pairs."""
        # The Trainer's timer includes the computation of the reference log-probs.
        runtime = result.metrics["train_runtime"] - trainer.reference_seconds
        return {
            "first_loss": _first_loss(job.settings.output_dir),
            "reference_seconds": round(trainer.reference_seconds, 2),
            "seconds_per_step": round(runtime / max(1, trainer.steps_run), 4),
            "completion_tokens": trainer.sums["completion_tokens"],
            "completion_tokens_per_second": round(trainer.tokens_seen / max(runtime, 1e-9), 1),
            "pairs": job.data.sizes(),
            "dropped": job.data.dropped,
            "accounting": accounting(job.data.accounts, trainer.totals()),
        }


def other_generators(settings: Settings, model_key: str) -> str | None:
    """Return a remark if no responses of the pairs are from the model that training starts from: a model of the wrong name or
    folder, most often. Pairs that do not say where they come from are left out.
    """
    mixer, splits = settings.data.dataset_mixer, settings.data.dataset_splits
    found = [origin for path in mixer for split in splits if (origin := provenance_of(path, split))]
    others = {origin.model: None for origin in found if origin.weights_hash}
    if not others or any(origin.weights_hash and model_key.startswith(origin.weights_hash) for origin in found):
        return None
    return (
        f"warning: training starts from {settings.model.model_name_or_path}, but the responses in the pairs are from "
        f"{' and '.join(others)}: self-play starts from the model that generated them"
    )


def _first_loss(output_dir: Path) -> float | None:
    """Return the recorded first loss; None if its file is damaged, which must not end a training that is already done."""
    try:
        return read_first_loss(output_dir)
    except InputError as error:
        say_error(f"metrics.json has no first_loss: {error}")
        return None
