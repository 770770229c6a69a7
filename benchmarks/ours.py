"""This project as a contender, also with one of its optimisations disabled at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns


def run(job: Job, turns: Turns, **settings: Any) -> None:
    """Train with SPINTrainer; ``settings`` are keys of SPINConfig that differ from the defaults."""
    from spin.alignment.training.trainer import SPINTrainer

    _train(SPINTrainer, job, turns, settings)


def run_uncached(job: Job, turns: Turns) -> None:
    """Train with SPINTrainer, and pass every micro-batch through a second model as if its log-probs were not stored.

    The loss still uses the stored ones, which are equal.
    """
    import torch

    from benchmarks.shapes import load_model
    from spin.alignment.logprobs.forward import batch_logps, install_packed_forward
    from spin.alignment.training.trainer import SPINTrainer

    class UncachedTrainer(SPINTrainer):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            # Not self.opponent: the trainer would compute full distributions with it.
            self.second_model = load_model(job.model_folder, job.weights).to(job.device).eval()
            install_packed_forward(self.second_model)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> Any:
            with torch.no_grad():
                batch_logps(self.second_model, inputs.batch)
            return super().compute_loss(model, inputs, *arguments, **settings)

    _train(UncachedTrainer, job, turns, {})


def _train(trainer_class: Any, job: Job, turns: Turns, settings: dict[str, Any]) -> None:
    from datasets import Dataset

    from benchmarks.shapes import load_model, make_tokenizer
    from benchmarks.training import TurnCallback, common_arguments
    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.training.trainer import SPINConfig

    unknown = set(settings) - {field.name for field in fields(SPINConfig)}
    if unknown:
        raise SystemExit(f"SPINConfig has no key {', '.join(sorted(unknown))}")
    if job.optimizer == "rmsprop":
        settings = {"optim_args": "bias_correction=false"} | settings  # like the peers' RMSprop
    model = load_model(job.model_folder, job.weights)
    turns.baseline()
    trainer = trainer_class(
        model=model,
        args=SPINConfig(**(common_arguments(job) | settings)),
        train_dataset=PairDataset(Dataset.from_list(job.rows())),
        processing_class=make_tokenizer(model.config.vocab_size),
        reference_hash="benchmark",
        callbacks=[TurnCallback(job, turns, reference_on_train_begin=True)],
    )
    turns.ready()
    trainer.train()
