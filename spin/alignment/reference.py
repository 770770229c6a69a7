"""The opponent's token log-probabilities: computed once before training, stored on disk, keyed by what they depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from spin.alignment.batching import PairCollator, PairDataset
from spin.alignment.errors import InputError
from spin.alignment.logps import response_logps
from spin.alignment.provenance import hash_json, hash_text
from spin.alignment.shards import atomic_file, remove_files

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

_KEY = b"spin.reference"
_SCHEMA = pa.schema([("index", pa.int64()), ("chosen", pa.list_(pa.float32())), ("rejected", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class ReferenceKey:
    """Everything the opponent's log-probs depend on; a store with another key is refused."""

    weights: str
    tokens: str
    precision: str

    def name(self) -> str:
        return hash_json(asdict(self))


def hash_tokens(rows: Dataset) -> str:
    """Return one hash of all prompt and response ids, in order."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return hash_text(*(np.asarray(row[name], dtype=np.int32).tobytes().hex() for row in rows for name in columns))


class ReferenceLogps:
    """A store on disk, memory-mapped: ``store[i]`` gives the chosen and rejected token log-probs (nats) of pair i."""

    def __init__(self, path: Path, key: ReferenceKey, rows: Dataset) -> None:
        """Open a store and check that it belongs to these weights, tokens and precision.

        Raises:
            InputError: the store is damaged, belongs to something else, or lacks rows.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged ({error}): remove it and it is computed again") from error
        found = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        differing = [name for name, value in asdict(key).items() if found.get(name) != value]
        if differing or table.num_rows != len(rows):
            what = ", ".join(differing) or "the number of rows"
            raise InputError(
                f"{path} belongs to another opponent or data set ({what} differs): remove it to compute it anew"
            )
        self._columns = [table.column(name).combine_chunks() for name in ("chosen", "rejected")]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen, rejected = (column[index].values.to_numpy(zero_copy_only=False) for column in self._columns)
        return chosen, rejected


def store_path(folder: str | Path, split: str, key: ReferenceKey) -> Path:
    """Return where the store of a split lies."""
    return Path(folder) / f"{split}-{key.name()}.arrow"


def compute_reference(
    model: Any,
    dataset: PairDataset,
    path: Path,
    key: ReferenceKey,
    collator: PairCollator,
    batch_size: int,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
) -> None:
    """Compute and store the log-probs of all pairs with the prepared policy, each process a share of the batches.

    Every process runs the same number of forwards, as ZeRO-3 and FSDP need; the surplus ones repeat the last batch.
    """
    batches = length_sorted_batches(dataset.rows, batch_size)
    count, rank = accelerator.num_processes, accelerator.process_index
    rounds = -(-len(batches) // count)
    results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    was_training = model.training
    model.eval()
    for turn in range(rounds):
        indices = batches[min(turn * count + rank, len(batches) - 1)]
        features = [dataset.rows[index] for index in indices]
        batch = {name: value.to(accelerator.device) for name, value in collator(features).items()}
        with torch.no_grad():
            logps = response_logps(model, batch).float().cpu()
        for row, (index, feature) in enumerate(zip(indices, features, strict=True)):
            chosen = logps[row, : len(feature["chosen_ids"])]
            rejected = logps[len(indices) + row, : len(feature["rejected_ids"])]
            results[index] = (chosen.numpy(), rejected.numpy())
        progress(turn + 1, rounds)
    model.train(was_training)
    part = path.with_name(f".{path.name}.rank{rank}")
    _write(part, results, key)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _merge(path, count, key, len(dataset))
    accelerator.wait_for_everyone()


def length_sorted_batches(rows: Dataset, batch_size: int) -> list[list[int]]:
    """Return batches of row indices, longest pairs first, so that running out of memory happens at once."""
    columns = [rows[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*columns, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _write(path: Path, results: dict[int, tuple[np.ndarray, np.ndarray]], key: ReferenceKey) -> None:
    order = sorted(results)
    columns = [order, *([results[index][half] for index in order] for half in (0, 1))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    _write_table(path, pa.table(arrays, schema=_SCHEMA), key)


def _write_table(path: Path, table: pa.Table, key: ReferenceKey) -> None:
    schema = _SCHEMA.with_metadata({_KEY: json.dumps(asdict(key)).encode()})
    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table.combine_chunks().cast(schema))


def _merge(path: Path, processes: int, key: ReferenceKey, num_rows: int) -> None:
    parts = [path.with_name(f".{path.name}.rank{rank}") for rank in range(processes)]
    table = pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(part))).read_all() for part in parts])
    indices, first = np.unique(table.column("index").to_numpy(), return_index=True)  # surplus batches come twice
    if len(indices) != num_rows:
        raise RuntimeError(f"{len(indices)} of {num_rows} pairs have reference log-probs; a process lost its share")
    _write_table(path, table.take(first), key)
    remove_files(path.parent.glob(f".{path.name}.rank*"))
