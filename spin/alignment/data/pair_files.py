"""The files of preference pairs, read in batches; which of their rows a mixture uses, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import batch_rows, open_parquet, read_batches
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.data.column_types import OWN_COLUMNS, check_items, is_own_format, joined
from spin.alignment.data.mixture import Piece, pieces_of, shuffled
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

_CHECKED = sorted(OWN_COLUMNS)
_NAMED = ["prompt_id", "sample_index"]  # the columns that name a pair


@dataclass(frozen=True)
class PairFile:
    """One file of pairs (or a data set of the Hub) in the columns of docs/data_format.md.

    Attributes:
        name: what messages call it.
        schema: its columns; without provenance, which is checked when the file is found.
        read: streams its rows, as they are; all columns, or only some.
        is_checked: whether its rows are known to keep the contract; else :meth:`check` has to be called with each batch.
    """

    name: str
    schema: pa.Schema
    num_rows: int
    read: Callable[[Sequence[str] | None], Iterator[pa.RecordBatch]]
    is_checked: bool

    def check(self, batch: pa.RecordBatch, first: int) -> None:
        """Check a batch of rows, of which the first is row ``first`` of the file.

        Raises:
            InputError: a row violates the contract; it is named.
        """
        if self.is_checked:
            return
        check_items(batch, self.name)
        check_finish_reasons(batch, self.name)
        suspect = suspect_columns(batch.schema.names)
        found = batch.select(suspect).to_pylist() if suspect else []
        check_own_columns(((f"{self.name} row {first + place}", values) for place, values in enumerate(found)), suspect)
        # Sampled ids mark a chosen response that a model generated, which may be empty.
        sampled = batch.column("chosen_token_ids") if "chosen_token_ids" in batch.schema.names else None
        own = sampled.is_valid().to_pylist() if sampled is not None else [False] * batch.num_rows
        rows = zip(batch_rows(batch.select(_CHECKED), self.name), own, strict=True)
        for row, (pair, is_own) in enumerate(rows, start=first):
            for name in _NAMED:
                if pair[name] is None:
                    raise InputError(f"{self.name} row {row} has no {name}: give every row one, or remove the column")
            check_pair(pair["chosen"], pair["rejected"], f"{self.name} row {row}", is_own)

    def table(self) -> pa.Table:
        """Return all rows, checked."""
        batches, row = [], 0
        for batch in self.read(None):
            self.check(batch, row)
            row += batch.num_rows
            batches.append(batch)
        return pa.Table.from_batches(batches, self.schema)


def pair_files(path: str, split: str) -> list[PairFile]:
    """Return the files of a split. Pairs in another form than docs/data_format.md are converted, in memory.

    Raises:
        InputError: a file is missing or damaged, files come from different runs, or pairs cannot be converted.
    """
    if not is_local(path):  # a data set on the Hub, or a path that read_records() refuses
        return [_converted(converted_table(read_records(path, split), path), path)]
    files = split_files(path, split)
    _check_one_provenance(files)
    return [_pair_file(file) for file in files]


def _pair_file(file: Path) -> PairFile:
    if file.suffix == ".parquet":
        opened = open_parquet(file)
        schema = opened.schema_arrow
        if is_own_format(schema):
            # Tables with different provenance cannot be joined; it has been compared by _check_one_provenance().
            plain = schema.remove_metadata()
            return PairFile(str(file), plain, opened.metadata.num_rows, partial(_plain_batches, file), is_checked=False)
    return _converted(converted_table(read_records(str(file), None), str(file)), str(file))


def _plain_batches(file: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    return (batch.replace_schema_metadata(None) for batch in read_batches(file, columns=columns))


def _converted(table: pa.Table, name: str) -> PairFile:
    table = table.replace_schema_metadata(None)

    def read(columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        for batch in table.select(columns or table.column_names).to_batches(max_chunksize=1024):
            # A copy, because a slice is sent to another process with all of its table.
            yield batch.take(pa.array(np.arange(batch.num_rows)))

    return PairFile(name, table.schema, table.num_rows, read, is_checked=True)


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


def check_finish_reasons(rows: pa.Table | pa.RecordBatch, name: str) -> None:
    """Check the words for the end of a response: one that was cut off must not be trained as if it had ended.

    Raises:
        InputError: there are others than ``stop`` and ``length``.
    """
    for column in FINISH_COLUMNS & {*rows.schema.names}:
        found = {*pc.unique(rows.column(column)).to_pylist()} - {None, "stop", "length"}
        if found:
            raise InputError(
                f"{name} has '{column}' {min(found)!r}: write 'stop', or 'length' for a response that was cut off"
            )


def check_repeated(table: pa.Table, path: str) -> None:
    """Check that no sample of a prompt occurs twice.

    Raises:
        InputError: one does; it is named.
    """
    counts = table.group_by(_NAMED).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1)).to_pylist()
    if repeated:
        raise InputError(
            f"{path} contains sample {repeated[0]['sample_index']} of prompt {repeated[0]['prompt_id']} "
            f"{repeated[0]['count_all']} times: remove the repeated rows or convert the data again"
        )


@dataclass(frozen=True)
class PairBatch:
    """Consecutive rows of one file of a mixture.

    Attributes:
        piece, file: numbers of the data set, and of the file in it.
        row: number of the first row in the file.
        first: its number in all files of the mixture.
    """

    piece: int
    file: int
    row: int
    first: int
    rows: pa.RecordBatch


class PairMixture:
    """One split of a mixture: the files of all of its data sets, without their rows.

    Attributes:
        schema: the columns of all rows, with ``source``, the data set that a row came from.
        counts: number of rows of each data set.
        order: numbers (in all files) of the rows that are used, in their order; int64.
    """

    def __init__(self, pieces: Sequence[Piece], seed: int) -> None:
        """Find the files.

        Raises:
            InputError: as :func:`pair_files`; or a data set has no rows, or columns of different types.
        """
        self.pieces = pieces
        self.files = [pair_files(piece.source, piece.split) for piece in pieces]
        names = [f"{piece.source} [{piece.split}]" for piece in pieces]
        for piece, files in zip(pieces, self.files, strict=True):
            if not any(file.num_rows for file in files):
                raise InputError(
                    f"{piece.source} contains no pairs of the split '{piece.split}': generate and convert some first"
                )
        self._names = names
        tables = [
            _joined_schema([file.schema for file in files], [file.name for file in files]) for files in self.files
        ]
        self._schemas = [schema.append(pa.field("source", pa.string())) for schema in map(_without_source, tables)]
        self.schema = _joined_schema(self._schemas, names)
        self.counts = [sum(file.num_rows for file in files) for files in self.files]
        self.order = _order(pieces, self.counts, seed)

    def batches(self) -> Iterator[PairBatch]:
        """Stream the rows of all files in order, one batch in memory at a time."""
        first = 0
        for number, files in enumerate(self.files):
            for index, file in enumerate(files):
                row = 0
                for rows in file.read(None):
                    yield PairBatch(number, index, row, first, rows)
                    row += rows.num_rows
                    first += rows.num_rows

    def name_of(self, batch: PairBatch, row: int) -> str:
        """Return what messages call a row of a batch."""
        return f"{self.files[batch.piece][batch.file].name} row {batch.row + row}"

    def read(self, batch: PairBatch) -> pa.Table:
        """Check the rows of a batch and return them with the columns of :attr:`schema`.

        Raises:
            InputError: a row violates the contract, or a value does not have the type of its column.
        """
        file, source = self.files[batch.piece][batch.file], self.pieces[batch.piece].source
        file.check(batch.rows, batch.row)
        table = _without_column(pa.Table.from_batches([batch.rows]), "source")
        table = table.append_column("source", pa.array([source] * table.num_rows, pa.string()))
        table = _with_schema(table, self._schemas[batch.piece], file.name)
        return _with_schema(table, self.schema, self._names[batch.piece])

    def check_repeated(self) -> None:
        """Check that no data set has a sample of a prompt twice.

        Raises:
            InputError: one does; it is named.
        """
        for piece, files in zip(self.pieces, self.files, strict=True):
            found = [_pair_numbers(batch) for file in files for batch in file.read(_NAMED)]
            numbers = np.sort(np.concatenate(found))
            if (numbers[1:] == numbers[:-1]).any():  # equal samples, or different ones with the same number
                tables = [pa.Table.from_batches(file.read(_NAMED)) for file in files if file.num_rows]
                check_repeated(joined(tables, [file.name for file in files if file.num_rows]), piece.source)


def _pair_numbers(batch: pa.RecordBatch) -> np.ndarray:
    """Return 64-bit numbers of the pairs of a batch that have an id: equal for the same sample of the same prompt."""
    pairs = zip(*(batch.column(name).to_pylist() for name in _NAMED), strict=True)
    named = [f"{sample}\0{prompt}".encode() for prompt, sample in pairs if prompt is not None and sample is not None]
    return np.fromiter(map(xxhash.xxh3_64_intdigest, named), np.uint64, len(named))


def pair_mixtures(dataset_mixer: Mapping[str, float], splits: Sequence[str], seed: int) -> dict[str, PairMixture]:
    """Return the splits of a mixture, ``train`` and, if there are held-out splits, ``test``.

    Raises:
        InputError: no data set or training split is given, one is named twice or cannot be read, or a fraction is out of range.
    """
    pieces = pieces_of(dataset_mixer, splits, preference_split)
    uses = dict.fromkeys(piece.use for piece in pieces)
    return {use: PairMixture([piece for piece in pieces if piece.use == use], seed) for use in uses}


def _order(pieces: Sequence[Piece], counts: Sequence[int], seed: int) -> np.ndarray:
    """Return the numbers of the rows that are used, in order: held-out rows as they come, training rows shuffled."""
    first, found = 0, []
    for piece, count in zip(pieces, counts, strict=True):
        found.append(first + piece.places(count, seed))
        first += count
    used = np.concatenate(found)
    return used[shuffled(len(used), seed)] if pieces[0].use == "train" else used


def _joined_schema(schemas: Sequence[pa.Schema], names: Sequence[str]) -> pa.Schema:
    return joined([schema.empty_table() for schema in schemas], names).schema


def _with_schema(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """Return a table with the columns of a schema that its own can be joined with; those that it lacks are null."""
    if table.schema == schema:
        return table
    return joined([table, schema.empty_table()], [name, name]).select(schema.names)


def _without_source(schema: pa.Schema) -> pa.Schema:
    # A column of the data with this name has nothing to do with training.
    return schema.remove(schema.get_field_index("source")) if "source" in schema.names else schema


def _without_column(table: pa.Table, name: str) -> pa.Table:
    return table.drop_columns([name]) if name in table.column_names else table
