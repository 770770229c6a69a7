"""Loading, checking and mixing preference rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import batch_rows, open_parquet, read_batches
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.data.column_types import OWN_COLUMNS, is_own_format, joined
from spin.alignment.data.foreign_forms import FOREIGN_PAIR_COLUMNS
from spin.alignment.data.mixture import pieces_of
from spin.alignment.data.preference_forms import (
    FINISH_COLUMNS,
    check_own_columns,
    check_pair,
    converted_table,
    suspect_columns,
)
from spin.alignment.data.source_files import read_records, split_files
from spin.alignment.data.source_names import is_local
from spin.alignment.data.split_names import preference_split
from spin.alignment.data.turns import Message, present_fields

if TYPE_CHECKING:
    from datasets import Dataset


_CHECKED = sorted(OWN_COLUMNS)


def split_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Return the prompt of a pair: the common prefix of both conversations, excluding the last turn of each."""
    prompt: list[Message] = []
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if present_fields(ours) != present_fields(theirs):
            break
        prompt.append(ours)
    return prompt


def load_preferences(path: str | Path, split: str) -> Dataset:
    """Load the preference rows of a split (``train`` is the same as ``train_prefs``) in the format of docs/data_format.md.

    Rows in the forms of ``preference_forms.py`` and ``foreign_forms.py`` and rows without ids or token ids are accepted: a
    missing ``prompt_id`` becomes the hash of the prompt, a missing ``sample_index`` counts the rows of a prompt.

    Raises:
        InputError: a file is missing or damaged, a column is missing, a row violates the contract, a sample appears twice,
            or the files come from different runs.
    """
    from datasets import Dataset

    path = str(path)
    tables = _preference_tables(path, preference_split(split))
    table = joined([table for _, table in tables], [name for name, _ in tables])
    if table.num_rows == 0:
        raise InputError(f"{path} contains no pairs of the split '{split}': generate and convert some first")
    _check_finish_reasons(table, path)
    _check_repeated(table, path)
    return Dataset(table)


def to_preferences(rows: Dataset, name: str) -> Dataset:
    """Return preference rows in memory in the format of docs/data_format.md.

    Rows with the columns of that format are checked and keep every other column they have. All others are converted: a text or
    conversation ``prompt`` with a text or conversation as ``chosen`` and ``rejected``, or whole conversations without
    ``prompt``. A text is one turn of a conversation: the user's as ``prompt``, the assistant's as a response.

    Args:
        name: what messages call the data set.

    Raises:
        InputError: no rows, a missing column, a row that breaks the contract, or a sample that occurs twice.
    """
    from datasets import Dataset

    if len(rows) == 0:
        raise InputError(f"{name} has no rows: give at least one pair")
    rows = rows.with_format(None)
    if is_own_format(rows.with_format("arrow")[:].schema):
        check_own_columns(((f"{name} row {number}", row) for number, row in enumerate(rows)), rows.column_names)
        for number, row in enumerate(rows):
            check_pair(row["chosen"], row["rejected"], f"{name} row {number}", row.get("chosen_token_ids") is not None)
        rows = Dataset(joined([rows.with_format("arrow")[:]], [name]))
    else:
        rows = Dataset(converted_table(((f"{name} row {number}", row) for number, row in enumerate(rows)), name))
    _check_finish_reasons(rows.with_format("arrow")[:], name)
    _check_repeated(rows.with_format("arrow")[:], name)
    return rows


def _preference_tables(path: str, split: str) -> list[tuple[str, pa.Table]]:
    """Return the pairs of each file of a split, with the name of the file."""
    if not is_local(path):  # a data set on the Hub, or a path that read_records() refuses
        return [(path, converted_table(read_records(path, split), path))]
    tables = []
    files = split_files(path, split)
    _check_one_provenance(files)
    for file in files:
        if file.suffix == ".parquet" and is_own_format(open_parquet(file).schema_arrow):
            tables.append((str(file), _own_table(file)))
        else:
            tables.append((str(file), converted_table(read_records(str(file), None), str(file))))
    return tables


def pair_batches(file: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the columns and the rows of a file of pairs: parquet as it is, unless other tools' columns have to be renamed;
    anything else in the format of docs/data_format.md.

    Raises:
        InputError: the file is damaged, or a row violates the contract.
    """
    if file.suffix == ".parquet":
        schema = open_parquet(file).schema_arrow
        if FOREIGN_PAIR_COLUMNS.isdisjoint(schema.names):
            return schema, read_batches(file)
    table = converted_table(read_records(str(file), None), str(file))
    return table.schema, iter(table.to_batches())


def _check_one_provenance(files: Sequence[Path]) -> None:
    first: tuple[Path, Provenance] | None = None
    for file in files:
        schema = open_parquet(file).schema_arrow if file.suffix == ".parquet" else pa.schema([])
        if METADATA_KEY not in (schema.metadata or {}):
            continue
        provenance = read_provenance(schema, file)
        first = first or (file, provenance)
        differences = first[1].differences(provenance, ignore=("data_frac",))
        if differences:
            raise InputError(
                f"{first[0]} and {file.name} come from different runs ({'; '.join(differences)}): convert the data again"
            )


def conversion_record(path: str, split: str) -> dict[str, Any]:
    """Return what the files of a split say of their conversion (``extra`` of the provenance); empty for files from elsewhere."""
    provenance = provenance_of(path, split)
    return provenance.extra if provenance else {}


def provenance_of(path: str, split: str) -> Provenance | None:
    """Return the provenance of the pairs of a split; None for files from elsewhere."""
    files = split_files(path, preference_split(split)) if is_local(path) else []
    for file in files:
        schema = open_parquet(file).schema_arrow if file.suffix == ".parquet" else pa.schema([])
        if METADATA_KEY in (schema.metadata or {}):
            return read_provenance(schema, file)
    return None


def _own_table(file: Path) -> pa.Table:
    batches, row = [], 0
    suspect = suspect_columns(open_parquet(file).schema_arrow.names)
    for batch in read_batches(file):
        found = batch.select(suspect).to_pylist() if suspect else []
        check_own_columns(((f"{file} row {row + place}", values) for place, values in enumerate(found)), suspect)
        # Sampled ids mark a chosen response that a model generated, which may be empty.
        sampled = batch.column("chosen_token_ids") if "chosen_token_ids" in batch.schema.names else None
        own = sampled.is_valid().to_pylist() if sampled is not None else [False] * batch.num_rows
        for pair, is_own in zip(batch_rows(batch.select(_CHECKED), file), own, strict=True):
            for name in ("prompt_id", "sample_index"):
                if pair[name] is None:
                    raise InputError(f"{file} row {row} has no {name}: give every row one, or remove the column")
            check_pair(pair["chosen"], pair["rejected"], f"{file} row {row}", is_own)
            row += 1
        batches.append(batch)
    schema = open_parquet(file).schema_arrow
    # Provenance is dropped here: it has been checked, and tables with different metadata cannot be concatenated.
    return pa.Table.from_batches(batches, schema).replace_schema_metadata(None)


def _check_finish_reasons(table: pa.Table, path: str) -> None:
    """Refuse other words for the end of a response: one that was cut off would be trained as if it had ended."""
    for name in FINISH_COLUMNS & {*table.column_names}:
        found = {*pc.unique(table[name]).to_pylist()} - {None, "stop", "length"}
        if found:
            raise InputError(
                f"{path} has '{name}' {min(found)!r}: write 'stop', or 'length' for a response that was cut off"
            )


def _check_repeated(table: pa.Table, path: str) -> None:
    counts = table.group_by(["prompt_id", "sample_index"]).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1)).to_pylist()
    if repeated:
        raise InputError(
            f"{path} contains sample {repeated[0]['sample_index']} of prompt {repeated[0]['prompt_id']} "
            f"{repeated[0]['count_all']} times: remove the repeated rows or convert the data again"
        )


def mix_preferences(dataset_mixer: Mapping[str, float], splits: Sequence[str], seed: int) -> dict[str, Dataset]:
    """Load and mix the data sets of ``dataset_mixer`` (path -> fraction of its training rows, in (0, 1]).

    Returns ``{"train": ..., "test": ...}`` with all splits named in ``splits``; held-out splits are used in full, as in the
    original. A column ``source`` gives the path each row came from; the training rows are shuffled with ``seed``.

    Raises:
        InputError: no data set or training split is given, one is named twice or cannot be read, or a fraction is out of range.
    """
    from datasets import Dataset

    found: dict[str, list[tuple[str, pa.Table]]] = {}
    for piece in pieces_of(dataset_mixer, splits, preference_split):
        rows = piece.selected(load_preferences(piece.source, piece.split), seed)
        table = rows.add_column("source", [piece.source] * len(rows)).with_format("arrow")[:]
        found.setdefault(piece.use, []).append((f"{piece.source} [{piece.split}]", table))
    mixed = {
        use: Dataset(joined([table for _, table in parts], [name for name, _ in parts])) for use, parts in found.items()
    }
    return mixed | {"train": mixed["train"].shuffle(seed=seed)}
