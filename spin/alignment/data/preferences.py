"""Preference rows: loading, checking and mixing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet, read_batches
from spin.alignment.core.provenance import METADATA_KEY, Provenance, read_provenance
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.data.formats import Message, check_conversation, prompt_hash, whole_conversation
from spin.alignment.data.rows import LABEL_TYPE, OPTIONAL_COLUMNS, PREFERENCE_SCHEMA
from spin.alignment.data.source_files import read_records, split_files

if TYPE_CHECKING:
    from datasets import Dataset


def split_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Return the prompt of a pair: the common prefix of both conversations, at most all but the last turn of each."""
    prompt: list[Message] = []
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        prompt.append(ours)
    return prompt


def load_preferences(path: str, split: str) -> Dataset:
    """Load preference rows of a split (``train`` and ``train_prefs`` name the same) in the format of docs/data_format.md.

    The original's ``real``/``generated`` columns, rows with a column ``prompt``, and rows without ids or token ids are
    accepted: a missing ``prompt_id`` is the hash of the prompt, a missing ``sample_index`` counts the rows of a prompt.

    Raises:
        InputError: a file is missing or damaged, a column is missing, a row breaks the contract, one sample stands twice,
            or the files come from different runs.
    """
    from datasets import Dataset

    tables = _preference_tables(path, split)
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows == 0:
        raise InputError(f"{path} holds no pairs of the split '{split}': generate and convert some first")
    _check_repeated(table, path)
    return Dataset(table)


def _preference_tables(path: str, split: str) -> list[pa.Table]:
    if not Path(path).exists():
        return [_foreign_table(read_records(path, split.removesuffix("_prefs")), path)]
    tables = []
    files = split_files(Path(path), split.removesuffix("_prefs"))
    _check_one_provenance(files)
    for file in files:
        columns = set(open_parquet(file).schema_arrow.names) if file.suffix == ".parquet" else set()
        if {"prompt_id", "sample_index", "chosen", "rejected"} <= columns:
            tables.append(_own_table(file))
        else:
            tables.append(_foreign_table(read_records(str(file), None), str(file)))
    return tables


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


def _own_table(file: Path) -> pa.Table:
    batches, row = [], 0
    for batch in read_batches(file):
        sampled = batch.column("chosen_token_ids") if "chosen_token_ids" in batch.schema.names else None
        own = sampled.is_valid().to_pylist() if sampled is not None else [False] * batch.num_rows
        for pair, is_own in zip(batch.select(["chosen", "rejected"]).to_pylist(), own, strict=True):
            check_pair(pair["chosen"], pair["rejected"], f"{file} row {row}", is_own)
            row += 1
        batches.append(batch)
    schema = open_parquet(file).schema_arrow
    return pa.Table.from_batches(batches, schema).replace_schema_metadata(None)


def _foreign_table(records: Iterator[tuple[str, Mapping[str, Any]]], source: str) -> pa.Table:
    fields = {field.name: field.type for field in PREFERENCE_SCHEMA} | OPTIONAL_COLUMNS
    rows, samples, present = [], Counter[str](), {"prompt_id", "sample_index", "chosen", "rejected"}
    for where, record in records:
        row = _preference_row(record, where)
        row.setdefault("sample_index", samples[row["prompt_id"]])
        samples[row["prompt_id"]] += 1
        rows.append(row)
        present |= fields.keys() & row.keys()
    columns = {name: kind for name, kind in fields.items() if name in present}
    schema = pa.schema([*columns.items(), *((name, LABEL_TYPE) for name in _label_columns(rows, fields))])
    try:
        return pa.Table.from_pylist(rows, schema)
    except pa.ArrowException as error:
        raise InputError(f"{source} holds a value of the wrong type ({error}): see docs/data_format.md") from error


def _label_columns(rows: Sequence[Mapping[str, Any]], known: Iterable[str]) -> list[str]:
    """Return the columns ``chosen_X`` and ``rejected_X`` that hold a number, or nothing, in every row: labels of a response."""
    names = {name for row in rows for name in row if name.startswith(tuple(f"{side}_" for side in SIDES))} - {*known}
    numbers = {name for name in names if all(_is_number(row.get(name)) for row in rows)}
    return sorted(name for name in numbers if {f"{side}_{name.partition('_')[2]}" for side in SIDES} <= numbers)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _preference_row(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    row = {name: value for name, value in record.items() if value is not None}
    if {"real", "generated"} <= row.keys():
        row["chosen"], row["rejected"] = row.pop("real"), row.pop("generated")
    for name in SIDES:
        if name not in row:
            raise InputError(f"{where} lacks the column '{name}': convert the data with spin/convert_data.py")
    conversations = {name: whole_conversation(row, name, where) for name in (*SIDES, INITIAL) if name in row}
    row |= conversations
    check_pair(row["chosen"], row["rejected"], where, row.get("chosen_token_ids") is not None)
    row["prompt_id"] = str(row.get("prompt_id") or prompt_hash(row["chosen"][:-1]))
    return row


def _check_repeated(table: pa.Table, path: str) -> None:
    counts = table.group_by(["prompt_id", "sample_index"]).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1)).to_pylist()
    if repeated:
        raise InputError(
            f"{path} holds sample {repeated[0]['sample_index']} of prompt {repeated[0]['prompt_id']} "
            f"{repeated[0]['count_all']} times: remove the repeated rows or convert the data again"
        )


def check_pair(chosen: Any, rejected: Any, where: str, own_chosen: bool = False) -> None:
    """Check one pair: two conversations that differ in their last (assistant) turn only.

    An empty response of the model itself (``rejected``, and ``chosen`` with ``own_chosen``) is allowed here: it may have
    answered with EOS alone.

    Raises:
        InputError: naming ``where`` and what is wrong.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
            raise InputError(f"{where}: '{name}' must hold turns of 'role' and 'content': convert the data again")
    if own_chosen and chosen and chosen[-1]["content"] == "":
        check_conversation([*chosen[:-1], {**chosen[-1], "content": "EOS"}], where)
    else:
        check_conversation(chosen, where)
    if not rejected or rejected[-1]["role"] != "assistant" or list(chosen[:-1]) != list(rejected[:-1]):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' do not share one prompt: both must differ in the last turn only"
        )
    if not isinstance(rejected[-1]["content"], str):
        raise InputError(f"{where}: the rejected response is not text: convert the data again")


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and {"role", "content"} <= turn.keys()


def mix_preferences(dataset_mixer: Mapping[str, float], splits: Sequence[str], seed: int) -> dict[str, Dataset]:
    """Load and mix the data sets of ``dataset_mixer`` (path -> fraction of its training rows, in (0, 1]).

    Returns ``{"train": ..., "test": ...}`` as far as ``splits`` names them; test splits are taken whole, as in the
    original. A column ``source`` names the path each row came from; the training rows are shuffled with ``seed``.

    Raises:
        InputError: no data set, a fraction out of range, or an unreadable data set.
    """
    from datasets import concatenate_datasets

    if not dataset_mixer:
        raise InputError("dataset_mixer is empty: write at least one 'path: fraction' line")
    for path, fraction in dataset_mixer.items():
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise InputError(f"dataset_mixer gives {path} the fraction {fraction}: set it above 0 and at most 1")
    mixed: dict[str, Dataset] = {}
    for split in splits:
        name = "test" if split.startswith("test") else "train"
        pieces = []
        for path, fraction in dataset_mixer.items():
            rows = load_preferences(path, split)
            if name == "train" and fraction < 1:
                rows = rows.shuffle(seed=seed).select(range(max(1, int(fraction * len(rows)))))
            pieces.append(rows.add_column("source", [path] * len(rows)))
        joined = concatenate_datasets(_aligned(pieces))
        mixed[name] = joined.shuffle(seed=seed) if name == "train" else joined
    if "train" not in mixed:
        raise InputError(f"dataset_splits is {list(splits)}: name a training split such as train_prefs")
    return mixed


def _aligned(pieces: list[Dataset]) -> list[Dataset]:
    from datasets import Dataset

    columns = [{*piece.column_names} for piece in pieces]
    if all(names == columns[0] for names in columns):
        return pieces
    union = pa.concat_tables([piece.with_format("arrow")[:] for piece in pieces], promote_options="default")
    return [Dataset(union)]
