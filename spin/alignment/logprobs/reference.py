"""Computes the reference log-probs of a split once, before training."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list

from spin.alignment.core.arrow_rows import rows_in_order
from spin.alignment.core.console import say_error
from spin.alignment.core.content_hash import remove_sealed, sealed_file
from spin.alignment.core.errors import NotFiniteError
from spin.alignment.logprobs.batch import Feature, PairDataset
from spin.alignment.logprobs.collators import PackedCollator
from spin.alignment.logprobs.micro_batches import MicroBatcher
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.logprobs.plans import consecutive, plan_by_pairs
from spin.alignment.logprobs.reference_store import _KEY, ReferenceKey, key_of, read_table

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

logger = logging.getLogger(__name__)

_PART_PAIRS = 512  # pairs per part: at most this many are recomputed after a kill


def _schema(responses: Sequence[str]) -> pa.Schema:
    return pa.schema([("index", pa.int64()), *((name, pa.list_(pa.float32())) for name in responses)])


def log_progress(what: str) -> Callable[[int, int], None]:
    """Return a progress callback for :func:`compute_reference` that logs about ten lines."""

    def progress(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            logger.info("%s: %d of %d batches", what, done, total)

    return progress


def compute_reference(
    forward: PairForward,
    dataset: PairDataset,
    path: Path,
    key: ReferenceKey,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
) -> None:
    """Compute and store the log-probs of all pairs, dividing the micro-batches among processes.

    Finished pairs are written in parts as they are computed; after a kill, only the missing ones are computed. Every process runs
    the same number of forward passes, as ZeRO-3 and FSDP require; surplus ones repeat the last micro-batch.

    Raises:
        NotFiniteError: a log-prob is not finite; nothing of its part is stored.
    """
    missing = _missing(path, key, len(dataset), accelerator)
    batches = longest_first(dataset.rows, missing, forward.batcher)
    count, rank = accelerator.num_processes, accelerator.process_index
    rounds = -(-len(batches) // count)
    schema = _schema(forward.batcher.collator.responses)
    results: dict[int, list[np.ndarray]] = {}
    # Use the prepared model, so that rounding is the same as in training and the first loss is ln 2.
    with forward.evaluation():
        for turn in range(rounds):
            indices = batches[min(turn * count + rank, len(batches) - 1)].tolist()
            logps = [response.numpy() for response in forward.logps([dataset.rows[index] for index in indices])]
            check_finite(logps, [dataset.rows[index] for index in indices], indices)
            # logps lists all chosen responses, then all rejected ones: a stride picks those of one pair.
            results |= {index: logps[place :: len(indices)] for place, index in enumerate(indices)}
            if len(results) >= _PART_PAIRS or turn + 1 == rounds:
                _write(path.with_name(f".{path.name}.part-{uuid.uuid4().hex[:12]}"), results, key, schema)
                results = {}
            progress(turn + 1, rounds)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _merge(path, key, len(dataset))
    accelerator.wait_for_everyone()


def check_finite(logps: Sequence[np.ndarray], rows: Sequence[Feature], indices: Sequence[int] = ()) -> None:
    """Refuse log-probs of ``rows`` that are not finite: all first responses, then all second ones, and so on.

    ``indices`` are the numbers of the rows in their data set, for the message.

    Raises:
        NotFiniteError: some are not finite.
    """
    bad = {number % len(rows) for number, values in enumerate(logps) if not np.isfinite(values).all()}
    if bad:
        pairs = f" of pair {', '.join(str(indices[number]) for number in sorted(bad))}" if indices else ""
        raise NotFiniteError(f"a reference log-prob{pairs} is not finite", [rows[number] for number in sorted(bad)])


def _missing(path: Path, key: ReferenceKey, num_rows: int, accelerator: Accelerator) -> np.ndarray:
    """Return the indices of the pairs that are in no part, as seen by the main process."""
    # One process decides: on a network file system others may see a different listing, and the run would then hang.
    found: list[Any] = [None]
    if accelerator.is_main_process:
        parts = _parts(path, key)
        done = np.concatenate([np.empty(0, np.int64), *(table.column("index").to_numpy() for table in parts)])
        found = [np.setdiff1d(np.arange(num_rows), done)]
    return broadcast_object_list(found)[0]


def longest_first(rows: Dataset, indices: np.ndarray, batcher: MicroBatcher) -> list[np.ndarray]:
    """Return micro-batches of row indices, longest pairs first, so that an out-of-memory error comes at once."""
    sizes = batcher.collator.tokens_of(rows)[indices]
    longest = np.argsort(-sizes, kind="stable")
    order = indices[longest]
    if not isinstance(batcher.collator, PackedCollator):
        return [order[batch] for batch in plan_by_pairs(len(order), batcher.pairs)]
    return [order[run.start : run.stop] for run in consecutive(sizes[longest].tolist(), batcher.token_budget)]


def _write(path: Path, results: dict[int, list[np.ndarray]], key: ReferenceKey, schema: pa.Schema) -> None:
    order = sorted(results)
    columns = [order, *([results[index][place] for index in order] for place in range(len(schema) - 1))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    _write_batches(path, [pa.record_batch(arrays, schema=schema)], schema, key)


def _write_batches(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, key: ReferenceKey) -> None:
    with_key = schema.with_metadata({_KEY: json.dumps(asdict(key)).encode()})
    with sealed_file(path) as file, pa.ipc.new_file(file, with_key) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(with_key.metadata))


def _parts(path: Path, key: ReferenceKey) -> list[pa.Table]:
    tables = []
    for part in sorted(path.parent.glob(f".{path.name}.part-*")):
        table = read_table(part)
        if table is None:
            say_error(f"{part} is damaged: its pairs are computed again")
            remove_sealed([part])
        elif key_of(table) == asdict(key):
            tables.append(table)
    return tables


def _merge(path: Path, key: ReferenceKey, num_rows: int) -> None:
    parts = _parts(path, key)
    numbers = np.concatenate([part.column("index").to_numpy() for part in parts])
    indices, first = np.unique(numbers, return_index=True)  # surplus batches are duplicates
    if len(indices) != num_rows:
        raise RuntimeError(f"only {len(indices)} of {num_rows} pairs have reference log-probs: a process lost its part")
    batches = [batch for part in parts for batch in part.to_batches()]
    _write_batches(path, rows_in_order(batches, first), parts[0].schema, key)
    remove_sealed(path.parent.glob(f".{path.name}.part-*"))
