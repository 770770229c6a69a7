"""Which splits of which data sets a training reads: ``dataset_mixer`` and ``dataset_splits``, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spin.alignment.core.errors import InputError
from spin.alignment.data.source_files import split_files
from spin.alignment.data.source_names import is_local
from spin.alignment.data.split_names import is_held_out

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Piece:
    """One split of one data set.

    Attributes:
        use: ``train`` or ``test``.
        fraction: the share of the rows that is used, in (0, 1]; held-out splits are used in full, as in the original.
    """

    use: str
    source: str
    split: str
    fraction: float

    def places(self, count: int, seed: int) -> np.ndarray:
        """Return the numbers of the rows that are used, of ``count``: a random subset, because the first rows of a data set may
        all be of one kind."""
        if self.fraction == 1:
            return np.arange(count)
        return shuffled(count, seed)[: max(1, int(self.fraction * count))]

    def selected(self, rows: Dataset, seed: int) -> Dataset:
        """Return the rows that are used."""
        return rows if self.fraction == 1 else rows.select(self.places(len(rows), seed))


def shuffled(count: int, seed: int) -> np.ndarray:
    """Return the numbers of ``count`` rows in the order of ``datasets.Dataset.shuffle(seed)``."""
    return np.random.default_rng(seed).permutation(count)


def pieces_of(
    dataset_mixer: Mapping[str, float], splits: Sequence[str], read_as: Callable[[str], str] = str
) -> list[Piece]:
    """Return the splits that a training reads, each once, those of a split together.

    Args:
        dataset_mixer: data set -> fraction of its training rows.
        splits: their names; a held-out one is recognised by its name (:func:`is_held_out`).
        read_as: maps the name of a split to the one that is looked for first.

    Raises:
        InputError: no data set or no training split is named, a fraction is out of range, a split is missing, or the same
            rows would be read twice.
    """
    if not dataset_mixer:
        raise InputError("dataset_mixer is empty: write at least one 'path: fraction' line")
    for source, fraction in dataset_mixer.items():
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise InputError(f"dataset_mixer gives {source} the fraction {fraction}: set it above 0 and at most 1")
    pieces = []
    for split in splits:
        use = "test" if is_held_out(split) else "train"
        pieces += [
            Piece(use, source, read_as(split), fraction if use == "train" else 1)
            for source, fraction in dataset_mixer.items()
        ]
    if not any(piece.use == "train" for piece in pieces):
        raise InputError(f"dataset_splits is {list(splits)}: add a training split such as {read_as('train')}")
    _check_read_once(pieces)
    return pieces


def _check_read_once(pieces: Sequence[Piece]) -> None:
    readers: dict[str | Path, Piece] = {}
    for piece in pieces:
        rows: list[str | Path] = [f"{piece.source} {piece.split}"]
        if is_local(piece.source):
            rows = [file.resolve() for file in split_files(piece.source, piece.split)]
        for item in rows:
            other = readers.setdefault(item, piece)
            if other is not piece:
                raise InputError(
                    f"{piece.source} [{piece.split}] and {other.source} [{other.split}] are the same rows ({item}): name each "
                    "data set and split once in dataset_mixer and dataset_splits, and give a folder with a file for each split"
                )
