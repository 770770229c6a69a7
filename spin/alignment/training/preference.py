"""Preference training: from encoded pairs to a saved policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.alignment.training.preference_data import data_key

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.training.settings import Settings


def train(
    settings: Settings, pairs: dict[str, Dataset], dropped: dict[str, dict[str, int]], tokenizer: Any, key: str
) -> None:
    """Train, save the policy, and write metrics.json last."""
    from spin.alignment.core.files import read_json
    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.training.first_loss import FIRST_LOSS_FILE
    from spin.alignment.training.output_dir import OutputFolder
    from spin.alignment.training.run import load_policy, push_policy, report, train_policy
    from spin.alignment.training.settings import inputs_record
    from spin.alignment.training.trainer import SPINTrainer

    folder = OutputFolder(settings, inputs_record(settings, key, data_key(pairs)))
    if folder.is_complete():
        report(settings, f"{folder.path} is complete already")
        push_policy(settings)
        return
    folder.prepare(settings.arguments.process_index == 0)
    model, dtypes = load_policy(settings)
    trainer = SPINTrainer(
        model=model,
        args=settings.arguments,
        train_dataset=PairDataset(pairs["train"]),
        eval_dataset=PairDataset(pairs["test"]) if "test" in pairs else None,
        processing_class=tokenizer,
        opponent_hash=key,
    )

    def describe(result: Any) -> dict[str, Any]:
        # The Trainer's clock starts before the opponent's log-probs are computed.
        runtime = result.metrics["train_runtime"] - trainer.reference_seconds
        return {
            "first_loss": read_json(folder.path / FIRST_LOSS_FILE),
            "reference_seconds": round(trainer.reference_seconds, 2),
            "seconds_per_step": round(runtime / max(1, trainer.steps_run), 4),
            "completion_tokens": trainer.tokens_seen,
            "completion_tokens_per_second": round(trainer.tokens_seen / max(runtime, 1e-9), 1),
            "pairs": {split: len(rows) for split, rows in pairs.items()},
            "dropped": dropped,
        }

    train_policy(trainer, folder, settings, dtypes, describe)
