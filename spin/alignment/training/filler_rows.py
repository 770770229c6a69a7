"""Rows that only keep the processes in step: a sampler that does not divide evenly is filled up, and the fillers count nowhere.

Left to itself, accelerate repeats rows from the start of an epoch until every process has the same number of full batches, and
every mean then counts those rows twice (``accelerate.data_loader.BatchSamplerShard``, ``even_batches``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FillerRow:
    """A row that must not count; under ZeRO-3 and FSDP, a process without any other row still runs a forward pass on it."""

    row: Any


class RowsWithFillers(torch.utils.data.Dataset):
    """A data set that also accepts the index ``~i`` (negative): row ``i`` as a :class:`FillerRow`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index] if index >= 0 else FillerRow(self.rows[~index])


class FilledBatches:
    """The batches of ``batches``, the last of them filled up with fillers and followed by batches of fillers, until all have
    the same size and their number is a multiple of ``multiple``.
    """

    drop_last = False

    def __init__(self, batches: Any, multiple: int) -> None:
        self._batches, self._multiple = batches, multiple
        self.batch_size: int = batches.batch_size

    @property
    def sampler(self) -> Any:
        """The sampler of the rows, whose epoch accelerate sets."""
        return self._batches.sampler

    def __len__(self) -> int:
        return -(-len(self._batches) // self._multiple) * self._multiple

    def __iter__(self) -> Iterator[list[int]]:
        filler = 0
        for batch in self._batches:
            filler = ~batch[0]
            yield [*batch, *[filler] * (self.batch_size - len(batch))]
        for _ in range(len(self) - len(self._batches)):
            yield [filler] * self.batch_size


def mark_fillers(loader: Any) -> Any:
    """Make a prepared data loader over :class:`RowsWithFillers` fill up with fillers instead of repeated rows; return it."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and shard.batch_size is not None and not shard.drop_last:
        # With split_batches, each batch is divided among the processes: only the last one needs filling up.
        shard.batch_sampler = FilledBatches(shard.batch_sampler, 1 if shard.split_batches else shard.num_processes)
    return loader


class EachRowOnce:
    """For a Trainer: an epoch contains every row once, and fillers if several processes need them.

    The trainer's collator receives the fillers as :class:`FillerRow`.
    """

    accelerator: Accelerator

    def _get_dataloader(self, dataset: Any, *arguments: Any, **settings: Any) -> Any:
        """Return transformers' data loader for this process."""
        load = super()._get_dataloader  # type: ignore[misc]  # the Trainer's
        if self.accelerator.num_processes == 1 or isinstance(dataset, torch.utils.data.IterableDataset):
            return load(dataset, *arguments, **settings)
        return mark_fillers(load(RowsWithFillers(dataset), *arguments, **settings))


def real_rows(rows: Sequence[Any]) -> list[Any]:
    """Return the rows of a batch that are not fillers; possibly none."""
    return [row for row in rows if not isinstance(row, FillerRow)]
