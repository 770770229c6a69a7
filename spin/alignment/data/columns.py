"""What a column of a foreign row means: one rule for every reader.

A column is used (the reader has read it), carried (passed to scorers), ignored (a copy of text that is used), or refused by
name (:mod:`refused_columns`). What is carried or ignored is reported once per data set.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.remarks import remark
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.data.refused_columns import LABEL_COLUMNS, check_column, is_empty, refusals_of

# Harmless columns that repeat the text of others: neither trained on nor passed to scorers.
COPIES = frozenset({"completion", "conversations", "messages", "prompt", "real", "response", "text"})
# Columns of the project's own rows that only some readers need.
OWN = frozenset({"prompt_id", "id", "sample_index", "generated", INITIAL, *SIDES})
EXTRA_COLUMNS = "extra_columns"
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEMPLATE_COLUMNS = ("tools", "functions", "chat_template_kwargs")
_SIDE_PREFIXES = tuple(f"{side}_" for side in (*SIDES, INITIAL))
# Columns that most rows lack.
_RARE = frozenset({*SYSTEM_COLUMNS, *LABEL_COLUMNS, *REASONING_KEYS, *TEMPLATE_COLUMNS, EXTRA_COLUMNS})


@functools.lru_cache(maxsize=1024)
def has_rare_columns(names: tuple[str, ...]) -> bool:
    """Return whether one of a row's columns holds a system prompt, label, thought, template argument or the scorers' columns."""
    return not _RARE.isdisjoint(names)


class Record(Mapping[str, Any]):
    """A foreign row that remembers which of its columns were read (``used``); ``in`` and iteration do not count."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row, self.used = row, set[str]()

    def __getitem__(self, name: str) -> Any:
        value = self.row[name]
        self.used.add(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.row else default

    def __contains__(self, name: object) -> bool:
        return name in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class RowNotes:
    """What was found in the rows of one data set besides what is trained on; :meth:`tell` reports it in one line.

    Attributes:
        carried, ignored: columns passed to scorers, and columns that are not.
        labels: X of numeric columns chosen_X and rejected_X.
        turn_keys: ignored keys of turns.
        label_false: number of rows whose response has the label false.
        repeated: number of rows that share their prompt with an earlier row, where that is allowed.
    """

    carried: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    turn_keys: set[str] = field(default_factory=set)
    label_false: int = 0
    repeated: int = 0

    def tell(self, source: str) -> None:
        """Report the notes in one line (:func:`remark`)."""
        parts = [
            ("columns passed to scorers only", self.carried),
            ("labels, for losses that read them", self.labels),
            ("ignored columns", self.ignored),
            ("ignored keys of turns", self.turn_keys),
        ]
        found = [f"{what}: {', '.join(sorted(names))}" for what, names in parts if names]
        if self.label_false:
            found.append(f"skipped, because a response with label false is no ground truth: {self.label_false}")
        if self.repeated:
            found.append(f"rows whose prompt an earlier row has too: {self.repeated}")
        if found:
            remark(f"{source}: {'; '.join(found)}")


def other_columns(record: Record, where: str, notes: RowNotes) -> dict[str, Any]:
    """Return the columns of a row that no reader has used and that scorers receive, once all others are checked.

    Raises:
        InputError: a column would change what is trained.
    """
    others = [
        name
        for name, value in record.row.items()
        # A flag named like a response (``rejected``: true) is not one.
        if not (name in record.used or (name in OWN and value is not True) or _belongs_to_side(name))
    ]
    whole = bool(others) and any(_is_turns(record.row[name]) for name in record.used)
    found = {}
    for name in others:
        value = record.row[name]
        if is_empty(value) and (name in COPIES or refusals_of(name)):
            continue
        check_column(name, value, where, whole)
        if name in COPIES or not _is_json(value):
            notes.ignored.add(name)
        else:
            notes.carried.add(name)
            found[name] = value
    return found


def _is_turns(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(item, Mapping) and {"role", "from"} & item.keys() for item in value
    )


def _belongs_to_side(name: str) -> bool:
    return name.startswith(_SIDE_PREFIXES)


def _is_json(value: Any) -> bool:
    try:
        to_json(value)
    except (TypeError, ValueError, RecursionError):  # bytes, for example, or nested too deep
        return False
    return True


def to_json(value: Any) -> str:
    """Return a value as JSON text, dates and decimals as text. ASCII, because parquet cannot store unpaired surrogates.

    Raises:
        TypeError, ValueError, RecursionError: it cannot be written as JSON.
    """
    return json.dumps(value, sort_keys=True, default=_as_text)


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def read_extra_columns(text: Any, where: str) -> dict[str, Any]:
    """Return the columns that the column ``extra_columns`` (JSON text) contains; empty if it is null.

    Raises:
        InputError: it is not the JSON text of an object.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: '{EXTRA_COLUMNS}' is not JSON text ({error}): remove the column") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: '{EXTRA_COLUMNS}' is not the JSON text of an object: remove the column")
    return found
