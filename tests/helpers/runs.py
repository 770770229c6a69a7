"""A run small enough for tests: a tiny model, sums as data, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import save_tiny_model

TRAINING: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "max_length": 64,
    "max_prompt_length": 32,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 5,
    "disable_tqdm": True,
}


def write_sums(folder: Path, num_train: int = 24, num_test: int = 8) -> Path:
    """Write train.jsonl and test.jsonl with prompts such as 3+1; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 0, num_train), ("test", 100, num_test)):
        rows = [{"prompt": f"{i}+1", "response": str(i + 1)} for i in range(first, first + count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_run(root: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a two-iteration run under ``root``; a change of None removes the key."""
    if not (root / "model").exists():
        save_tiny_model(root / "model")
        write_sums(root / "data")
    data = str(root / "data")
    values: dict[str, Any] = {
        "run_dir": str(root / "run"),
        "model": str(root / "model"),
        "iterations": 2,
        "data": {"train": data, "test": data},
        "generate": {"max_new_tokens": 8, "frac_len": 16, "flush_every": 4, "batch_size": 4},
        "train": TRAINING,
        "overrides": {1: {"beta": 1.0}},
        "evaluate": {"max_new_tokens": 8, "limit": 6},
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
