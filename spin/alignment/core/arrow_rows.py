"""Reading rows of Arrow record batches in another order than that of the batches, with little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

ROWS = 16_384  # of a batch that is written


def rows_in_order(batches: Sequence[pa.RecordBatch], order: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Yield the rows with these numbers (in all batches), in this order, :data:`ROWS` at a time.

    The batches may be memory-mapped; only the rows that are yielded are in memory.
    """
    ends = np.cumsum([batch.num_rows for batch in batches])
    for start in range(0, len(order), ROWS):
        yield _taken(batches, ends, order[start : start + ROWS])


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
