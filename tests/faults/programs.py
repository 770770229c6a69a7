"""The programs that the fault suite disturbs: inputs, arguments, and what of their output must be equal in the end."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import run_main, save_tiny_model
from tests.helpers.online import online_values, write_prompts
from tests.helpers.runs import tiny_run, write_sums
from tests.helpers.training import write_config as write_training_config
from tests.helpers.training import write_pairs

# Durations, dates and rates differ between two runs of the same thing.
_VOLATILE = re.compile(r"seconds|runtime|per_second|started_at|finished_at|mtime|memory|flos|_rate$")
# The last section of report.md; the rest of the report must be equal.
_MEASURED = re.compile(rb"\n## Time and memory\n.*", re.DOTALL)
# The manifest contains the hashes of files with durations. What is damaged is set aside under another name, which is said.
_NOT_COMPARED = re.compile(
    r"^manifest\.json$|\.log$|\.html$|\.png$|(^|/)\.|\.lock$|training_args\.bin$|checkpoint-\d+/(?!model\.safetensors)|\.damaged/|\.torn$|(^|/)logs/"
)


@dataclass(frozen=True)
class Program:
    """A program, and the arguments that make it read the inputs in one folder and write into another."""

    name: str
    arguments: Callable[[Path, Path], list[str]]

    def main(self, arguments: list[str]) -> int | None:
        return importlib.import_module(f"spin.{self.name}").main(arguments)


def make_inputs(folder: Path) -> Path:
    """Write what the programs read: models, prompts, responses, pairs, configurations."""
    folder.mkdir(parents=True)
    model = save_tiny_model(folder / "model")
    save_tiny_model(folder / "other", seed=1)
    write_sums(folder / "sums", num_train=20, num_test=6)
    write_pairs(folder / "pairs", count=16)
    write_pairs(folder / "pairs", count=6, split="test")
    write_prompts(folder / "prompts", count=12)
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    write_training_config(folder / "spin.yaml", model, folder / "pairs", **training)
    write_training_config(
        folder / "sft.yaml", model, folder / "sums", **{**training, "dataset_splits": ["train"], "learning_rate": 1e-3}
    )
    online = online_values(folder, model, folder / "prompts", **{**training, "ref_update_freq": 2})
    (folder / "online.yaml").write_text(yaml.safe_dump(online))
    code, _, said = run_main(PROGRAMS["generate"].main, *PROGRAMS["generate"].arguments(folder, folder / "generated"))
    assert code == 0, said
    code, _, said = run_main(
        PROGRAMS["convert_data"].main, *PROGRAMS["convert_data"].arguments(folder, folder / "converted")
    )
    assert code == 0, said
    return folder


def _trained(config: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, output: [str(inputs / config), f"--output_dir={output / 'model'}"]


def _flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


PROGRAMS = {
    "reformat": Program(
        "reformat",
        lambda inputs, output: _flags(data=inputs / "sums" / "train.jsonl", output_dir=output, test_size=5),
    ),
    "generate": Program(
        "generate",
        lambda inputs, output: _flags(
            model=inputs / "model",
            input_dir=inputs / "sums",
            output_dir=output,
            max_new_tokens=6,
            frac_len=9,
            flush_every=4,
            data_frac="auto",
            num_samples=2,
            batch_size=8,
        ),
    ),
    "convert_data": Program(
        "convert_data",
        lambda inputs, output: _flags(
            input_dir=inputs / "generated",
            output_dir=output,
            pairing="best_vs_worst",
            scorer="tests.helpers.online:share_of_letters",
            max_rows_per_file=6,
        ),
    ),
    "estimate_weights": Program(
        "estimate_weights",
        lambda inputs, output: [
            *_flags(input_dir=inputs / "converted", output_dir=output, weighting="reverse_dpo", dtype="float32"),
            *_flags(model_plus=inputs / "model", model_minus=inputs / "other"),
        ],
    ),
    "run_spin": Program("run_spin", _trained("spin.yaml")),
    "run_sft": Program("run_sft", _trained("sft.yaml")),
    "run_online": Program("run_online", _trained("online.yaml")),
    "evaluate_model": Program(
        "evaluate_model",
        lambda inputs, output: _flags(
            model=inputs / "model", input_dir=inputs / "sums", output_file=output / "eval.json", max_new_tokens=4
        ),
    ),
}

RUNS: dict[str, dict[str, Any]] = {
    "offline": {"iterations": 2},
    "online": {"iterations": None, "train": None, "generate": None, "overrides": None},
    "weights": {"iterations": 1, "overrides": None, "weigh": {"weighting": "reverse_dpo"}},
}


def make_run(folder: Path, kind: str) -> Path:
    """Write the configuration of a tiny run of a kind in ``RUNS``; return its path."""
    changes = dict(RUNS[kind])
    train = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 64,
        "max_prompt_length": 32,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
    }
    if kind == "online":
        changes["online"] = {
            **train,
            "num_samples": 2,
            "max_new_tokens": 4,
            "scorer": "tests.helpers.online:share_of_letters",
        }
    else:
        changes["train"] = train
    if kind == "weights":
        changes["weigh"] = {**changes["weigh"], "train": {**train, "max_steps": 2}, "dtype": "float32"}
    values = tiny_run(folder, **changes)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, Any]:
    """Return what two runs of the same thing must have in common: files by name, without durations and dates."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not _NOT_COMPARED.search(name):
            found[name] = _stable_content(path)
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the files that differ or are in one of two results of :func:`contents` only."""
    return sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))


def _stable_content(path: Path) -> Any:
    if path.suffix == ".json":
        return _stable(json.loads(path.read_text()))
    content = path.read_bytes()
    return _MEASURED.sub(b"", content) if path.name == "report.md" else content


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(item) for name, item in value.items() if not _VOLATILE.search(name)}
    return [_stable(item) for item in value] if isinstance(value, list) else value
