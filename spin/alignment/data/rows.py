"""The row format of prompts and responses, and reading prompts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import hash_texts, id_number
from spin.alignment.core.sides import INITIAL
from spin.alignment.data.columns import EXTRA_COLUMNS, RowNotes, read_extra_columns
from spin.alignment.data.formats import CARRIED_COLUMNS, Conversation, to_conversations
from spin.alignment.data.source_files import read_records
from spin.alignment.data.turns import OPTIONAL_FIELDS, present_fields, turn_texts

if TYPE_CHECKING:
    from datasets import Dataset

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PROMPT_SCHEMA = pa.schema([("prompt_id", pa.string()), ("chosen", MESSAGES)])
GENERATED_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("rejected_finish_reason", pa.string()),
    ]
)
PREFERENCE_SCHEMA = GENERATED_SCHEMA
OPTIONAL_COLUMNS = {
    "chosen_token_ids": pa.list_(pa.int32()),
    "chosen_finish_reason": pa.string(),
    "chosen_weights": pa.list_(pa.float32()),
    "rejected_weights": pa.list_(pa.float32()),
    "chosen_gains": pa.list_(pa.float32()),
    "rejected_gains": pa.list_(pa.float32()),
    "rejected_logprobs": pa.list_(pa.float32()),
    INITIAL: MESSAGES,
    f"{INITIAL}_token_ids": pa.list_(pa.int32()),
    f"{INITIAL}_finish_reason": pa.string(),
}
# Columns of any row that exist only in files in which some row has them; JSON text.
CARRIED_TYPES = dict.fromkeys(CARRIED_COLUMNS, pa.string())
# A label of a response, such as chosen_score and rejected_score.
LABEL_TYPE = pa.float64()


def turns_type(fields: Iterable[str] = ()) -> pa.DataType:
    """Return the type of a conversation whose turns have some of the optional ``fields``."""
    known = [name for name in OPTIONAL_FIELDS if name in set(fields)]
    return pa.list_(pa.struct([*MESSAGES.value_type, *((name, pa.string()) for name in known)]))


def is_turns_type(found: pa.DataType) -> bool:
    """Return whether a column contains conversations, with or without optional fields."""
    return pa.types.is_list(found) and found in (turns_type(_fields_of(found)), MESSAGES)


def _fields_of(found: pa.DataType) -> set[str]:
    value = found.value_type
    return {value.field(place).name for place in range(value.num_fields)} if pa.types.is_struct(value) else set()


@dataclass
class Features:
    """Which optional fields of turns and which carried columns occur in some rows."""

    fields: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        """Note those of a row, in all of its conversations."""
        self.columns.update(name for name in CARRIED_COLUMNS if row.get(name) is not None)
        for name in ("chosen", "rejected", INITIAL):
            for turn in row.get(name) or ():
                self.fields.update(item for item in OPTIONAL_FIELDS if turn.get(item) is not None)

    def extend(self, schema: pa.Schema) -> pa.Schema:
        """Return a schema with these fields in its conversations and these columns; without any, the schema itself."""
        wide = turns_type(self.fields)
        kinds = [wide if item.type == MESSAGES else item.type for item in schema]
        carried = [(name, CARRIED_TYPES[name]) for name in CARRIED_COLUMNS if name in self.columns]
        return pa.schema([*zip(schema.names, kinds, strict=True), *carried])


def stream_prompts(
    input_dir: str, split: str, ground_truth_required: bool = True, may_repeat: bool = False
) -> Iterator[dict[str, Any]]:
    """Stream the prompts of a split with their ground truth: ``prompt_id`` (unique unless they ``may_repeat``), ``chosen``, and
    those of ``CARRIED_COLUMNS`` that the row has.

    ``input_dir`` is a folder, a file or a Hub name, in the project's own format or any in ``formats.py``. Unless
    ``ground_truth_required``, a row may have no ground truth: its ``chosen`` is then the prompt and ends with a user turn. What
    is skipped, ignored or passed to scorers only is reported after the last row.

    Raises:
        InputError: a row violates the row contract, or (after the last row) two rows share a prompt id that may not, or none is
            left.
    """
    seen = array("Q")  # 8 bytes per prompt, where a set of ids would take about 100
    notes = RowNotes()
    for _, conversation in _conversations(input_dir, split, ground_truth_required, notes):
        seen.append(id_number(conversation.prompt_id))
        yield conversation.row()
    unique, counts = np.unique(np.frombuffer(seen, dtype=np.uint64), return_counts=True)
    repeated = len(seen) - len(unique)
    notes.repeated = repeated if may_repeat else 0
    notes.tell(input_dir)
    if not seen:
        raise InputError(
            f"{input_dir} has only rows with label false, which have no ground truth: give good responses too"
        )
    if repeated and not may_repeat:
        _name_repeated(input_dir, split, ground_truth_required, {int(number) for number in unique[counts > 1]})


def _conversations(
    input_dir: str, split: str, ground_truth_required: bool, notes: RowNotes
) -> Iterator[tuple[str, Conversation]]:
    for where, record in read_records(input_dir, split):
        for found in to_conversations(record, where, ground_truth_required=ground_truth_required, notes=notes):
            yield where, found


def _name_repeated(input_dir: str, split: str, ground_truth_required: bool, numbers: set[int]) -> None:
    """Read the data a second time to find the two rows that share an id, and raise an error that names them."""
    places: dict[str, str] = {}
    for where, conversation in _conversations(input_dir, split, ground_truth_required, RowNotes()):
        if id_number(conversation.prompt_id) not in numbers:
            continue
        earlier = places.setdefault(conversation.prompt_id, where)
        if earlier != where:
            raise InputError(
                f"{where} and {earlier} have the same prompt id {conversation.prompt_id}: run spin/reformat.py, which "
                "removes repeated prompts"
            )
    raise RuntimeError("two different prompt ids have the same 64-bit number")


def load_prompts(input_dir: str, split: str, ground_truth_required: bool = True, may_repeat: bool = False) -> Dataset:
    """Load the prompts of a split into memory (see :func:`stream_prompts`)."""
    from datasets import Dataset

    rows, features = [], Features()
    for row in stream_prompts(input_dir, split, ground_truth_required, may_repeat):
        features.add(row)
        rows.append(row)
    return Dataset(pa.Table.from_pylist(rows, features.extend(PROMPT_SCHEMA)))


def to_prompt_rows(rows: Dataset, name: str) -> list[dict[str, Any]]:
    """Return the prompt rows of a data set in memory, as :func:`stream_prompts` yields them.

    A row has the prompt alone (column ``prompt``, text or turns) or its ground truth too, in any form that ``formats.py`` knows.

    Raises:
        InputError: no rows, a row breaks the row contract, or two rows share a prompt id; ``name`` is the data set's in messages.
    """
    if len(rows) == 0:
        raise InputError(f"{name} has no rows: give at least one prompt")
    found: dict[str, dict[str, Any]] = {}
    notes = RowNotes()
    for number, record in enumerate(rows.with_format(None)):
        where = f"{name} row {number}"
        for conversation in to_conversations(record, where, ground_truth_required=False, notes=notes):
            if conversation.prompt_id in found:
                raise InputError(
                    f"{where} has the prompt id {conversation.prompt_id} of an earlier row: remove one of them"
                )
            found[conversation.prompt_id] = conversation.row()
    notes.tell(name)
    if not found:
        raise InputError(f"{name} has only rows with label false, which have no ground truth: give good responses too")
    return list(found.values())


def carried_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the carried columns that a row has."""
    return {name: row[name] for name in CARRIED_COLUMNS if row.get(name) is not None}


def scorer_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the source that a row carries for scorers (its column ``extra_columns``).

    Raises:
        InputError: the column is not the JSON text of an object.
    """
    return read_extra_columns(row.get(EXTRA_COLUMNS), f"prompt {row.get('prompt_id', '?')}")


def without_null_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt row without the null fields and columns that parquet or Arrow fills in."""
    turns = [present_fields(turn) for turn in row["chosen"]]
    return {"prompt_id": row["prompt_id"], "chosen": turns, **carried_columns(row)}


def prompt_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a prompt row, in order: the input of :func:`prompts_hash`."""
    yield row["prompt_id"]
    for turn in row["chosen"]:
        yield from turn_texts(turn)
    for name, text in carried_columns(row).items():
        yield from (name, text)


def prompts_hash(prompts: Iterable[Mapping[str, Any]]) -> str:
    """Return one hash of the ids and conversations of prompt rows, in order."""
    return hash_texts(text for row in prompts for text in prompt_texts(row))
