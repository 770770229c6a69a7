"""Rows of Arrow record batches in fewer batches, or in another order than that of the batches, with little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

# A batch that is written has this many rows, or bytes if that is less: long texts would take up gigabytes.
ROWS = 16_384
BYTES = 2**27


def rows_in_order(batches: Sequence[pa.RecordBatch], order: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the rows with these numbers (in all batches), in this order, about :data:`ROWS` or :data:`BYTES` at a time.

    The batches may be memory-mapped; only the rows that are yielded are in memory.
    """
    ends = np.cumsum([batch.num_rows for batch in batches])
    size = sum(batch.nbytes for batch in batches)
    count = max(1, min(ROWS, BYTES * int(ends[-1]) // max(1, size))) if len(ends) else 1
    for start in range(0, len(order), count):
        yield _taken(batches, ends, order[start : start + count])


def joined_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of at least :data:`ROWS` or :data:`BYTES`, except for the last; none is empty."""
    waiting: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        waiting.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= ROWS or size >= BYTES:
            yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()
            waiting, rows, size = [], 0, 0
    yield from pa.Table.from_batches(waiting, schema).combine_chunks().to_batches()


def _taken(batches: Sequence[pa.RecordBatch], ends: np.ndarray, rows: np.ndarray) -> pa.RecordBatch:
    """Return some rows, each batch being visited once. ``ends`` are the numbers of rows up to the end of each batch."""
    ordered = np.sort(rows)
    owners = np.searchsorted(ends, ordered, side="right")
    parts = []
    for owner in np.unique(owners):
        batch = batches[owner]
        parts.append(batch.take(pa.array(ordered[owners == owner] - (ends[owner] - batch.num_rows))))
    back = np.searchsorted(ordered, rows)
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0].take(pa.array(back))
