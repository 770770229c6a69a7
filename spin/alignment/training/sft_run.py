"""SFT: from encoded rows to a saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.training.settings import Settings


def train(settings: Settings, data: dict[str, Dataset], dropped: dict[str, int], tokenizer: Any, key: str) -> None:
    """Train, save the model, and write metrics.json last."""
    from spin.alignment.core.provenance import hash_json
    from spin.alignment.models.precision import prepare_precision
    from spin.alignment.training.output_dir import OutputFolder
    from spin.alignment.training.run import load_policy, push_policy, report, train_policy
    from spin.alignment.training.settings import inputs_record
    from spin.alignment.training.sft import TruthTrainer

    content = hash_json({split: [rows["input_ids"], rows["labels"]] for split, rows in data.items()})
    folder = OutputFolder(settings, inputs_record(settings, key, content))
    if folder.is_complete():
        report(settings, f"{folder.path} is complete already")
        push_policy(settings)
        return
    folder.prepare(settings.arguments.process_index == 0)
    model, dtypes = load_policy(settings)
    prepare_precision(model, settings.arguments)
    trainer = TruthTrainer(
        model=model,
        args=settings.arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("test"),
        processing_class=tokenizer,
    )
    counts = {"rows": {split: len(rows) for split, rows in data.items()}, "dropped": dropped}
    train_policy(trainer, folder, settings, dtypes, lambda result: counts)
