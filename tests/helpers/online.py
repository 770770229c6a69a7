"""What the tests of online training share: prompts, a reward by dotted path, and a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def share_of_letters(prompt: str, response: str, reference: str) -> float:
    """The reward of the tests: the share of characters that are letters; random models have some of each."""
    return sum(character.isalpha() for character in response) / max(1, len(response))


def letters_of_some(prompt: str, response: str, reference: str) -> float:
    """A reward that prefers something for one prompt in six."""
    return share_of_letters(prompt, response, reference) if int(prompt.split()[1]) % 6 == 0 else 1.0


def always_same(prompt: str, response: str, reference: str) -> float:
    """A reward that prefers nothing."""
    return 1.0


def write_prompts(folder: Path, count: int = 24, answered: bool = False) -> Path:
    """Prompts of different lengths, with ``answered`` their ground truth too; a test split of six."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, number in (("train", 0, count), ("test", 1000, 6)):
        rows = []
        for index in range(first, first + number):
            turns = [{"role": "user", "content": f"say {index} " + "please " * (index % 3)}]
            if answered:
                turns.append({"role": "assistant", "content": f"{index}"})
            rows.append({"prompt_id": f"p{index}", "messages": turns})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def online_values(folder: Path, model: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a short online DPO; a change of None removes the key."""
    values = {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(prompts): 1.0},
        "dataset_splits": ["train"],
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "train_sampling_strategy": "sequential",
        "num_samples": 4,
        "max_new_tokens": 8,
        "scorer": "tests.helpers.online:share_of_letters",
        "max_length": 96,
        "max_prompt_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


def write_online(folder: Path, model: Path, prompts: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "online.yaml"
    path.write_text(yaml.safe_dump(online_values(folder, model, prompts, **changes)))
    return path
