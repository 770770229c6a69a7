"""Dividing the prompts of a split into fractions, in the same shuffled order on every server."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np

from spin.alignment.core.errors import InputError

# Part of the file contract: every server must shuffle and divide the rows in the same way.
SHUFFLE_SEED = 42
PARTS_FOLDER = ".parts"


@functools.lru_cache(maxsize=1)
def shuffled_rows(num_rows: int) -> np.ndarray:
    """Return all row indices in the order from which fractions are taken: shuffled with seed 42, as in the original."""
    order = list(range(num_rows))
    # Python's generator, as in the original: numpy's gives another order.
    random.Random(SHUFFLE_SEED).shuffle(order)
    return np.array(order, dtype=np.int64)


def fraction_rows(num_rows: int, data_frac: int, frac_len: int) -> list[int]:
    """Return the row indices of a fraction: a slice of ``frac_len`` rows of the data shuffled with seed 42.

    With ``frac_len`` 0 there is one fraction with all rows. Fractions are disjoint and together cover the data.

    Raises:
        InputError: a negative number, or a fraction beyond the end of the data.
    """
    check_fraction(num_rows, data_frac, frac_len)
    return shuffled_rows(num_rows)[frac_len * data_frac :][: frac_len or None].tolist()


def check_fraction(num_rows: int, data_frac: int, frac_len: int) -> None:
    """Check that a fraction exists.

    Raises:
        InputError: a negative number, or a fraction beyond the end of the data.
    """
    total = num_fractions(num_rows, frac_len)
    if not 0 <= data_frac < total:
        raise InputError(
            f"data_frac is {data_frac}, but {num_rows} rows with frac_len {frac_len} give the fractions 0 to "
            f"{total - 1}: choose one of them"
        )


def fraction_size(num_rows: int, data_frac: int, frac_len: int) -> int:
    """Return the number of rows in a fraction."""
    check_fraction(num_rows, data_frac, frac_len)
    return min(frac_len or num_rows, num_rows - frac_len * data_frac)


def num_fractions(num_rows: int, frac_len: int) -> int:
    """Return the number of fractions of ``frac_len`` rows (1 if ``frac_len`` is 0)."""
    if frac_len < 0:
        raise InputError(f"frac_len is {frac_len}: set it to 0 (all rows) or to the number of rows per fraction")
    return max(1, -(-num_rows // frac_len)) if frac_len else 1


def fraction_path(output_dir: str | Path, split: str, data_frac: int) -> Path:
    """Return the path of a fraction's file."""
    return Path(output_dir) / f"{split}-{data_frac:05d}.parquet"
