"""What the tests of the training program share: small data, a configuration, and a run to compare others with."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from spin.alignment.core.content_hash import HASHES_FILE, lacks_hashes
from spin.alignment.data.config import DataConfig
from spin.alignment.training.encode_rows import ORIGIN
from spin.alignment.training.preference_data import column_hashes, encode_rows, joined_key
from tests.helpers import run_command

WORDS = ["red", "green", "blue", "seven", "eleven", "a longer answer here"]


def write_pairs(folder: Path, count: int = 24, split: str = "train", weights: bool = False) -> Path:
    """Preference rows without token ids, if asked for with token weights; the rejected response is another word."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}_prefs.jsonl").open("w") as file:
        for number in range(count):
            prompt = [{"role": "user", "content": f"say word {number}"}]
            chosen, rejected = WORDS[number % 6], WORDS[(number + 1) % 6] + "!" * (number % 4)
            row = {
                "prompt_id": f"p{number}",
                "chosen": [*prompt, {"role": "assistant", "content": chosen}],
                "rejected": [*prompt, {"role": "assistant", "content": rejected}],
            }
            if weights:  # a token is a character, and the end is one too
                for side, text in (("chosen", chosen), ("rejected", rejected)):
                    row[f"{side}_weights"] = [(7 * place + number) % 5 / 4 for place in range(len(text) + 1)]
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = write_pairs(tmp_path_factory.mktemp("pairs"))
    return write_pairs(folder, 6, "test")


def write_config(path: Path, tiny_model: Path, pairs: Path, **settings) -> Path:
    values = {
        "model_name_or_path": str(tiny_model),
        "dataset_mixer": {str(pairs): 1.0},
        "dataset_splits": ["train_prefs"],
        "output_dir": str(path.parent / "out"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 128,
        "max_prompt_length": 64,
        "disable_tqdm": True,
    } | settings
    path.write_text(yaml.safe_dump(values))
    return path


def train(
    config: Path, *arguments: str, launch: list[str] | None = None, program: str = "run_spin", **environment: str
) -> str:
    launch = launch or []
    file = [] if "tests.helpers.fsdp_on_cpu" in launch else [f"spin/{program}.py"]
    command = [sys.executable, *launch, *file, str(config), *arguments]
    done = run_command(command, TRAINING_PROGRAM=program, **environment)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-4000:]  # a launcher's own words come last
    return done.stdout


def launcher(config_file: str, *arguments: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"configs/{config_file}",
        "--main_process_port",
        str(port),
        *arguments,
    ]


# Real FSDP2 needs a wrapper on a CPU: accelerate would fall back to plain data parallelism.
TWO_PROCESSES = {
    "DDP": ("cpu.yaml",),
    "ZeRO-3": ("deepspeed_zero3_cpu.yaml",),
    "FSDP2": ("fsdp2.yaml", "--num_processes=2", "--mixed_precision=no", "-m", "tests.helpers.fsdp_on_cpu"),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def is_saved(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete, with its hashes, and will be resumed from."""
    return (checkpoint / HASHES_FILE).exists() and not lacks_hashes(checkpoint)


def late_margin(record: dict) -> float:
    """The mean margin of the second half of the steps: that of one step of four pairs is mostly chance."""
    margins = [entry["rewards/margins"] for entry in record["history"] if "rewards/margins" in entry]
    return sum(margins[len(margins) // 2 :]) / (len(margins) - len(margins) // 2)


def difference(left: Path, right: Path) -> float:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def reference_run(tiny_model, pairs, tmp_path_factory):
    """Two epochs in one process: what every other way of training must reproduce."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_config(
        folder / "c.yaml", tiny_model, pairs, num_train_epochs=2, dataset_splits=["train_prefs", "test_prefs"]
    )
    train(config)
    return folder / "out"


def encode_split(
    rows: Dataset, encoder: Any, config: DataConfig, loss_type: str = "sigmoid", reverse: bool = False
) -> Any:
    """Return encoded pairs without their origin, and the number of dropped rows by reason."""
    encoded, account = encode_rows(rows, encoder, config, loss_type, reverse)
    return encoded.remove_columns(ORIGIN), dict(account.dropped)


def data_key(pairs: dict[str, Dataset]) -> str:
    """Return the hash of encoded pairs in memory that a training records."""
    return joined_key({split: column_hashes(rows) for split, rows in pairs.items()})
