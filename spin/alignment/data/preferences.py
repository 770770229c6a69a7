"""Loading, checking and mixing preference rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet, read_batches
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.data.column_types import is_own_format, joined
from spin.alignment.data.foreign_forms import FOREIGN_PAIR_COLUMNS
from spin.alignment.data.pair_files import check_finish_reasons, check_repeated, pair_files, pair_mixtures
from spin.alignment.data.preference_forms import check_own_columns, check_pair, converted_table
from spin.alignment.data.source_files import read_records, split_files
from spin.alignment.data.source_names import is_local
from spin.alignment.data.split_names import preference_split
from spin.alignment.data.turns import Message, present_fields

if TYPE_CHECKING:
    from datasets import Dataset


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
    files = pair_files(path, preference_split(split))
    table = joined([file.table() for file in files], [file.name for file in files])
    if table.num_rows == 0:
        raise InputError(f"{path} contains no pairs of the split '{split}': generate and convert some first")
    check_repeated(table, path)
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
    check_finish_reasons(rows.with_format("arrow")[:], name)
    check_repeated(rows.with_format("arrow")[:], name)
    return rows


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


def mix_preferences(dataset_mixer: Mapping[str, float], splits: Sequence[str], seed: int) -> dict[str, Dataset]:
    """Load and mix the data sets of ``dataset_mixer`` (path -> fraction of its training rows, in (0, 1]) in memory.

    Returns ``{"train": ..., "test": ...}`` with all splits named in ``splits``; held-out splits are used in full, as in the
    original. A column ``source`` gives the path each row came from; the training rows are shuffled with ``seed``.

    Raises:
        InputError: no data set or training split is given, one is named twice or cannot be read, or a fraction is out of range.
    """
    from datasets import Dataset

    mixed = {}
    for use, mixture in pair_mixtures(dataset_mixer, splits, seed).items():
        table = pa.concat_tables(map(mixture.read, mixture.batches()))
        mixture.check_repeated()
        mixed[use] = Dataset(table).select(mixture.order)
    return mixed
