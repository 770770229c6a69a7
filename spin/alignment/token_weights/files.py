"""Preference files with token weights: the same rows under the same file names, and statistics of the weights."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, remove_files, write_json_atomic
from spin.alignment.core.parquet import ParquetSink, check_whole, open_parquet
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.core.sides import SIDES
from spin.alignment.data.column_types import OWN_TYPES
from spin.alignment.data.preferences import pair_batches
from spin.alignment.data.rows import OPTIONAL_COLUMNS

_COLUMNS = tuple(f"{side}_{name}" for side in SIDES for name in ("token_ids", "finish_reason", "weights"))
GAINS = tuple(f"{side}_gains" for side in SIDES)


@dataclass
class SideStatistics:
    """Count, mean, minimum and maximum of one side's weights, and the number that are 0, negative, or not scored."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    largest: float = -math.inf
    zero: int = 0
    negative: int = 0
    unscored: int = 0

    def add(self, weights: np.ndarray) -> None:
        known = weights[~np.isnan(weights)]
        self.unscored += len(weights) - len(known)
        if len(known):
            self.count += len(known)
            self.total += float(known.sum(dtype=np.float64))
            self.least, self.largest = min(self.least, float(known.min())), max(self.largest, float(known.max()))
            self.zero += int((known == 0).sum())
            self.negative += int((known < 0).sum())

    def record(self) -> dict[str, Any]:
        if not self.count:
            return {"tokens": 0, "unscored": self.unscored}
        return {
            "tokens": self.count,
            "mean": self.total / self.count,
            "min": self.least,
            "max": self.largest,
            "zero": self.zero,
            "negative": self.negative,
            "unscored": self.unscored,
        }


@dataclass
class WeightStatistics:
    """Statistics of a split's weights."""

    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    chosen: SideStatistics = field(default_factory=SideStatistics)
    rejected: SideStatistics = field(default_factory=SideStatistics)

    def record(self) -> dict[str, Any]:
        sides = {side: getattr(self, side).record() for side in SIDES}
        return {"rows": self.rows, "left_out": self.left_out, **sides}


@dataclass(frozen=True)
class WeightedRow:
    """The columns to write for one pair, chosen then rejected; ``reason`` says why a row has no weights."""

    ids: Sequence[Sequence[int] | None]
    finish_reasons: Sequence[str | None]
    weights: Sequence[Sequence[float] | None]
    reason: str = ""


def write_weighted(
    files: Sequence[Path],
    output_dir: Path,
    split: str,
    facts: dict[str, Any],
    rows: Iterator[WeightedRow],
) -> WeightStatistics:
    """Write the rows of ``files`` with their weights, file by file, then ``{split}_prefs.weights.json`` to mark completion.

    ``facts``, stored in the provenance of every file, says how the weights were computed; ``rows`` are in the files' order.
    """
    statistics = WeightStatistics()
    # Removed first: an interrupted rewrite must not leave a set that looks complete, nor files of an earlier one.
    proof, outputs = weights_file(output_dir, split), output_files(output_dir, split, files)
    remove_files([proof, *_written_files(output_dir, split)])
    for file, output in zip(files, outputs, strict=True):
        schema, batches = pair_batches(file)
        provenance = _provenance(schema, file, split)
        # Gains have become weights.
        fields = [item for item in schema if item.name not in (*_COLUMNS, *GAINS)]
        kinds = {**OWN_TYPES, **{item.name: item.type for item in schema}, **OPTIONAL_COLUMNS}
        added = [pa.field(name, kinds[name]) for name in _COLUMNS]
        with ParquetSink(
            output,
            pa.schema([*fields, *added]),
            replace(provenance, extra={**provenance.extra, "weights": facts}),
        ) as sink:
            for batch in batches:
                columns = _columns([next(rows) for _ in range(batch.num_rows)], statistics)
                kept = [batch.column(item.name) for item in fields]
                arrays = [pa.array(columns[item.name], item.type) for item in added]
                sink.write(pa.Table.from_arrays([*kept, *arrays], schema=pa.schema([*fields, *added])))
    write_json_atomic(proof, statistics.record())
    return statistics


def _columns(rows: Sequence[WeightedRow], statistics: WeightStatistics) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for row in rows:
        statistics.rows += 1
        if row.reason:
            statistics.left_out[row.reason] = statistics.left_out.get(row.reason, 0) + 1
        for number, side in enumerate(SIDES):
            found = row.weights[number]
            weights = None if found is None else np.asarray(found, dtype=np.float32)
            if weights is not None:
                getattr(statistics, side).add(weights)
            for name, value in (
                ("token_ids", row.ids[number]),
                ("finish_reason", row.finish_reasons[number]),
                ("weights", weights),
            ):
                columns[f"{side}_{name}"].append(value)
    return columns


def _provenance(schema: pa.Schema, file: Path, split: str) -> Provenance:
    if METADATA_KEY in (schema.metadata or {}):
        return read_provenance(schema, file)
    return Provenance(kind="preferences", split=split)


def _written_files(output_dir: Path, split: str) -> list[Path]:
    """Return the preference files of a split that exist in the output folder."""
    return sorted(output_dir.glob(f"{glob.escape(split)}_prefs*.parquet"))


def weights_file(output_dir: Path, split: str) -> Path:
    """Return the file that is written last: statistics of a split's weights, and proof that its files are complete."""
    return output_dir / f"{split}_prefs.weights.json"


def output_files(output_dir: Path, split: str, files: Sequence[Path]) -> list[Path]:
    """Return the files with weights, one for each file of pairs: under its name if it is parquet, else numbered."""
    if all(file.suffix == ".parquet" for file in files):
        return [output_dir / file.name for file in files]
    return [output_dir / f"{split}_prefs-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))]


def find_splits(input_dir: Path) -> dict[str, list[Path]]:
    """Return the preference files of each split in a folder, by split name.

    Raises:
        InputError: there are none, or a file of a numbered set is missing.
    """
    from spin.alignment.data.dataset_folders import find_splits as dataset_splits
    from spin.alignment.data.source_files import split_files
    from spin.alignment.data.split_names import preference_split

    names = {file.name.partition("_prefs")[0] for file in input_dir.glob("*_prefs*.parquet")}
    names = names or {name.removesuffix("_prefs") for name in dataset_splits(input_dir, None)}
    if not names:
        raise InputError(f"{input_dir} has no files such as train_prefs-*.parquet: run spin/convert_data.py first")
    return {name: split_files(input_dir, preference_split(name)) for name in sorted(names)}


def is_done(output_dir: Path, split: str, files: Sequence[Path], facts: dict[str, Any], overwrite: bool) -> bool:
    """Return whether a split is complete in the output folder, from the same files and with the same settings.

    Raises:
        InputError: it was created from other files or settings, and ``overwrite`` is false.
    """
    made = output_files(output_dir, split, files)
    if not weights_file(output_dir, split).exists():
        return False
    stale = [path for path in _written_files(output_dir, split) if path not in made]
    if stale and not overwrite:
        raise InputError(
            f"{stale[0]} was created from other pairs, whose files have other names: pass --overwrite or another output_dir"
        )
    if stale or not all(path.exists() for path in made):
        return False
    try:
        found = [read_provenance(open_parquet(path).schema_arrow, path).extra.get("weights") for path in made]
        for path in made:
            check_whole(path)
        read_statistics(output_dir, split)
    except InputError as error:
        say_error(f"{split}: weights computed again, because {error}")
        return False
    if all(item == facts for item in found):
        return True
    if overwrite:
        return False
    other = next(item or {} for item in found if item != facts)
    differing = ", ".join(key for key in {**facts, **other} if facts.get(key) != other.get(key))
    raise InputError(
        f"{made[0]} was created from other inputs or settings ({differing} differ): pass --overwrite or another output_dir"
    )


def read_statistics(output_dir: Path, split: str) -> dict[str, Any]:
    """Return the stored statistics of a split's weights.

    Raises:
        InputError: their file is damaged.
    """
    path = weights_file(output_dir, split)
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} contains no statistics: remove it to compute the weights again")
    return found
