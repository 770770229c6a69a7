"""The results that are committed: for each model and benchmark the averages (JSON), and one row per response without its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.evidence.plan import CONFIGS
from spin.alignment.core.files import atomic_file, read_json, write_json_atomic
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.provenance import hash_weights
from spin.alignment.evaluation.responses import HeldOutResponses, responses_path

KEPT = ("prompt_id", "temperature", "finish_reason", "score", "parts", "group", "nats", "tokens")


def result_path(study: str, arm: str, seed: int, model: str, benchmark: str, response_seed: int = 1) -> Path:
    """Return the JSON file of a result; its responses are in the parquet file of the same name."""
    suffix = "" if response_seed == 1 else f"-sample{response_seed}"
    return CONFIGS / study / f"{arm}-seed{seed}" / model / f"{benchmark}{suffix}.json"


def kept(path: Path, model: Path, flags: Mapping[str, Any]) -> bool:
    """Return whether a result is there, of the weights in ``model`` and of these settings."""
    if not path.is_file() or not responses_path(path).is_file():
        return False
    found = read_json(path)
    return found["flags"] == _recorded(flags) and found["weights_hash"] == hash_weights(model)


def keep(output: Path, path: Path, flags: Mapping[str, Any], cost: Mapping[str, float]) -> None:
    """Copy an evaluation to the committed results: averages, distinct n-grams, cost, and the responses without their text."""
    rows = list(read_rows(responses_path(output)))
    found = read_json(output) | {"flags": _recorded(flags), "cost": dict(cost)}
    for name in found["temperatures"]:
        texts = [row["response"] for row in rows if f"{row['temperature']:g}" == name]
        found["temperatures"][name] |= {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}
    del found["model"], found["input_dir"]  # folders of the machine
    schema = pq.read_schema(responses_path(output))
    fields = [schema.field(name) for name in KEPT] + [pa.field("length", pa.int32())]
    table = pa.Table.from_pylist(
        [{**{name: row[name] for name in KEPT}, "length": len(row["token_ids"])} for row in rows], pa.schema(fields)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(responses_path(path)) as file:
        pq.write_table(table, file, compression="zstd")
    write_json_atomic(path, found)


def keep_training(checkpoint: Path, path: Path, cost: Mapping[str, float]) -> None:
    """Copy what a training has logged to the committed results: all logs, numbers of rows, cost of the arm."""
    metrics = read_json(checkpoint / "metrics.json")
    names = ("first_loss", "final", "history", "rows", "dropped", "accounting", "seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {name: metrics[name] for name in names if name in metrics} | {"cost": dict(cost)})


def read_kept(path: Path) -> tuple[dict[str, Any], HeldOutResponses]:
    """Return a committed result: its averages, and its responses without their text."""
    responses = HeldOutResponses()
    for row in read_rows(responses_path(path)):
        responses.by_temperature.setdefault(f"{row['temperature']:g}", {})[row["prompt_id"]] = row
    return read_json(path), responses


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words divided by the number of all, over all texts (Li et al., NAACL 2016)."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return len(counts) / max(1, counts.total())


def _recorded(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an evaluation as JSON values, without the backend: it does not decide what is measured."""
    return {
        name: value if isinstance(value, list | int | float) else str(value)
        for name, value in flags.items()
        if name not in ("backend", "batch_size")
    }
