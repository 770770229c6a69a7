"""Diagnosing fractions that fail the proof of completeness: a slow search for the fault.

Only ids and sample indices are read. It runs when a gathering has failed anyway and, for fractions without recorded sums, to
look for repeated prompts (8 bytes per prompt).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet, read_batches, read_rows, read_skipped
from spin.alignment.core.provenance import id_number

if TYPE_CHECKING:
    from spin.alignment.pairs.fraction_file import Fraction

_BATCH_ROWS = 8192


def diagnose_fraction(fraction: Fraction, files: Mapping[int, Path]) -> InputError:
    """Return an error that says what is wrong with a fraction that does not contain the expected rows.

    ``files`` are the existing fractions of its split: a prompt that is missing or repeated here may be in one of them.
    """
    if broken := _broken_prompt(fraction):
        return broken
    files = {fraction.number: fraction.path, **{key: path for key, path in files.items() if _is_readable(path)}}
    return repeated_prompt(files, fraction.num_samples) or _stray_prompt(fraction, files) or _wrong_number(fraction)


def _is_readable(path: Path) -> bool:
    try:
        return "prompt_id" in open_parquet(path).schema_arrow.names
    except InputError:
        return False


def _broken_prompt(fraction: Fraction) -> InputError | None:
    """Find a prompt whose rows are not adjacent, or that has too many or too few samples."""
    path, wanted = fraction.path, list(range(fraction.num_samples))
    for prompt_id, samples in _groups(path):
        if prompt_id is None or None in samples:
            return InputError(f"{path} contains a row without prompt_id or sample_index: generate this fraction again")
        if sorted(samples) == wanted:
            continue
        everywhere = sorted(item for found, items in _groups(path) if found == prompt_id for item in items)
        if everywhere == wanted:
            return InputError(
                f"the {len(wanted)} rows of prompt {prompt_id} in {path} are not adjacent: generate this fraction again"
            )
        return InputError(
            f"{path} contains the samples {everywhere} of prompt {prompt_id}, but 0 to {len(wanted) - 1} are "
            "expected once each: generate this fraction again"
        )
    return None


def _groups(path: Path) -> Iterator[tuple[str, list[int]]]:
    rows = read_rows(path, _BATCH_ROWS, ["prompt_id", "sample_index"])
    for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
        yield prompt_id, [row["sample_index"] for row in group]


def _prompts(path: Path, num_samples: int) -> Iterator[str]:
    """Yield the id of every prompt in a file: that of each ``num_samples``-th row, then those that generation skipped."""
    start = 0  # number of the batch's first row, which may be in the middle of a prompt
    for batch in read_batches(path, _BATCH_ROWS, ["prompt_id"]):
        yield from (
            batch.column(0).take(pa.array(np.arange(-start % num_samples, batch.num_rows, num_samples))).to_pylist()
        )
        start += batch.num_rows
    yield from (item["prompt_id"] for item in read_skipped(path))


def _numbers(path: Path, num_samples: int) -> npt.NDArray[np.uint64]:
    return np.fromiter(map(id_number, _prompts(path, num_samples)), dtype=np.uint64)


def repeated_prompt(files: Mapping[int, Path], num_samples: int) -> InputError | None:
    """Look for a prompt that appears more than once in some files; return an error that names it and its files.

    Raises:
        InputError: a file cannot be read.
    """
    unique, counts = np.unique(
        np.concatenate([_numbers(path, num_samples) for path in files.values()]), return_counts=True
    )
    repeated = set(unique[counts > 1].tolist())
    if not repeated:
        return None
    # A second pass for the names: the first keeps only 64-bit numbers.
    places: dict[str, list[str]] = {}
    for _, path in sorted(files.items()):
        for prompt_id in _prompts(path, num_samples):
            if id_number(prompt_id) in repeated:
                places.setdefault(prompt_id, []).append(path.name)
    prompt_id, names = next(item for item in places.items() if len(item[1]) > 1)
    where = " and ".join(dict.fromkeys(names))
    return InputError(
        f"prompt {prompt_id} appears more than once, in {where}: generate {'it' if len(set(names)) == 1 else 'one of them'} again"
    )


def _stray_prompt(fraction: Fraction, files: Mapping[int, Path]) -> InputError | None:
    """Find the single prompt missing from this fraction in another one; the recorded sum gives its number."""
    own = _numbers(fraction.path, fraction.num_samples)
    if fraction.fraction_ids is None or len(own) not in (fraction.expected, fraction.expected - 1):
        return None
    # uint64 arithmetic wraps around, which is the sum modulo 2**64.
    lacking = np.array([fraction.fraction_ids], dtype=np.uint64) - own.sum(dtype=np.uint64)
    # If the number of prompts is right, one of them has replaced the missing one: try each.
    wanted = lacking + own if len(own) == fraction.expected else lacking
    for _, path in sorted(files.items()):
        if path == fraction.path:
            continue
        for prompt_id, found in zip(
            _prompts(path, fraction.num_samples), np.isin(_numbers(path, fraction.num_samples), wanted), strict=True
        ):
            if found:
                return InputError(
                    f"{fraction.path} is missing prompt {prompt_id}, which is in {path.name}: generate both fractions again"
                )
    return None


def _wrong_number(fraction: Fraction) -> InputError:
    found = sum(1 for _ in _prompts(fraction.path, fraction.num_samples))
    here, expected = found - len(fraction.skipped), fraction.expected - len(fraction.skipped)
    if here != expected:
        return InputError(f"{fraction.path} contains {here} prompts, but {expected} are expected: generate it again")
    return InputError(f"{fraction.path} contains prompts that do not belong to its fraction: generate it again")
