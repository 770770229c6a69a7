"""Preference rows in other formats, converted to the project's own: explicit prompts, other names, unpaired responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.remarks import remark
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.core.text import is_unicode
from spin.alignment.data.column_types import OWN_COLUMNS, OWN_TYPES, table_of
from spin.alignment.data.columns import EXTRA_COLUMNS, REASONING_KEYS, SYSTEM_COLUMNS, Record, RowNotes, other_columns
from spin.alignment.data.foreign_forms import pair_form
from spin.alignment.data.formats import (
    CARRIED_COLUMNS,
    PROMPT_COLUMNS,
    Conversation,
    check_turn_keys,
    read_label,
    template_columns,
    to_conversations,
    whole_conversation,
    with_system,
)
from spin.alignment.data.refused_columns import (
    CUT_OFF,
    ENDED,
    LABEL_COLUMNS,
    Refusal,
    check_column,
    check_pair_column,
    is_empty,
    pair_refusals_of,
    refusals_of,
)
from spin.alignment.data.row_ids import source_id
from spin.alignment.data.rows import LABEL_TYPE, Features
from spin.alignment.data.turns import check_conversation, present_fields, prompt_hash, take_context_marks, turn_texts

FINISH_COLUMNS = frozenset(f"{name}_finish_reason" for name in (*SIDES, INITIAL))
# What is text of the whole row, and refused as the text of one response.
_TEXTS_OF_ROWS = frozenset({*REASONING_KEYS, *SYSTEM_COLUMNS, *PROMPT_COLUMNS})


def converted_table(records: Iterator[tuple[str, Mapping[str, Any]]], source: str) -> pa.Table:
    """Convert foreign preference rows to the columns of docs/data_format.md; what is ignored is reported.

    Raises:
        InputError: a row breaks the contract or has a column that would change what is trained, or no pair can be formed.
    """
    notes, features, unpaired = RowNotes(), Features(), UnpairedResponses(source)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for where, record in records:
        if _is_unpaired(record):
            unpaired.add(record, where, notes)
        else:
            rows.append(_preference_row(record, where, notes))
            places.append(where)
    paired = unpaired.pairs()
    rows += paired
    places += [unpaired.places[row["prompt_id"]] for row in paired]
    samples, present = Counter[str](), set(OWN_COLUMNS)
    for row in rows:
        row.setdefault("sample_index", samples[row["prompt_id"]])
        samples[row["prompt_id"]] += 1
        present |= OWN_TYPES.keys() & row.keys()
        features.add(row)
    labels = _label_columns(rows, notes)
    columns = {name: kind for name, kind in OWN_TYPES.items() if name in present}
    schema = features.extend(pa.schema([*columns.items(), *((name, LABEL_TYPE) for name in labels)]))
    # Nothing scores these pairs, so what scorers would receive ends here.
    notes.ignored |= notes.carried
    notes.carried = set()
    notes.tell(source)
    return table_of(rows, schema, places)


def _is_unpaired(record: Mapping[str, Any]) -> bool:
    return not {"chosen", "rejected", "real", "generated"} & record.keys() and any(
        not is_empty(record.get(name)) for name in LABEL_COLUMNS
    )


@dataclass
class UnpairedResponses:
    """Rows of one response with a label (true for good, false for bad), to be paired with those of the same prompt."""

    source: str
    prompts: dict[str, dict[bool, list[Conversation]]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], where: str, notes: RowNotes) -> None:
        """Read one response.

        Raises:
            InputError: the row breaks the contract, or its label is neither true nor false.
        """
        label = read_label(row, where)
        good = {name: value for name, value in row.items() if name not in LABEL_COLUMNS}
        for conversation in to_conversations(good, where, notes=notes):
            group = self.prompts.setdefault(conversation.hash, {True: [], False: []})
            group[bool(label)].append(conversation)
            self.places.setdefault(conversation.hash, where)

    def pairs(self) -> list[dict[str, Any]]:
        """Return pairs in which every good and every bad response to a prompt occurs; report prompts with only one kind.

        Raises:
            InputError: there are responses, but no prompt has both kinds.
        """
        rows = []
        for group in self.prompts.values():
            good, bad = group[True], group[False]
            for number in range(max(len(good), len(bad)) if good and bad else 0):
                better, worse = good[number % len(good)], bad[number % len(bad)]
                rows.append(
                    {**better.row(), "prompt_id": better.hash, "rejected": worse.messages, "sample_index": number}
                )
        alone = [name for name, group in self.prompts.items() if not (group[True] and group[False])]
        if alone and not rows:
            raise InputError(
                f"{self.source} has responses with a label, but no prompt with both a good and a bad one (the first is "
                f"{self.places[alone[0]]}): give paired data, or generate the rejected responses from the good ones"
            )
        if alone:
            remark(
                f"{self.source}: {len(alone)} of {len(self.prompts)} prompts have only good or only bad responses and give no "
                f"pair (the first is {self.places[alone[0]]})"
            )
        return [{name: value for name, value in row.items() if name != EXTRA_COLUMNS} for row in rows]


def _preference_row(record: Mapping[str, Any], where: str, notes: RowNotes) -> dict[str, Any]:
    row = {name: value for name, value in pair_form(record, where).items() if value is not None}
    if {"real", "generated"} <= row.keys():
        if not row.keys().isdisjoint(SIDES):
            raise InputError(
                f"{where} has 'real' and 'generated' beside 'chosen' or 'rejected': keep one of the two forms"
            )
        row["chosen"], row["rejected"] = row.pop("real"), row.pop("generated")
    for name in SIDES:
        if name not in row:
            raise InputError(f"{where} lacks the column '{name}': convert the data with spin/convert_data.py")
    found = Record(row)
    responses = [name for name in (*SIDES, INITIAL) if name in row]
    conversations = {name: with_system(whole_conversation(found, name, where), found, where) for name in responses}
    for name, messages in conversations.items():
        if len(messages) - 1 in take_context_marks(messages):
            raise InputError(f"{where}: the last turn of '{name}' has weight 0: remove the weight or the row")
        if [message["role"] for message in messages] == ["assistant"] and isinstance(row[name], str):
            raise InputError(f"{where} has '{name}' as text without 'prompt': add that column, or give conversations")
    carried = template_columns(found, where)
    _check_others(found, where, notes)
    check_pair(conversations["chosen"], conversations["rejected"], where, row.get("chosen_token_ids") is not None)
    kept = {name: row[name] for name in row if name in OWN_TYPES or _side_of(name)}
    kept |= _finish_reasons(kept, where)
    if isinstance(index := kept.get("sample_index"), str) and index.strip().isdecimal():
        kept["sample_index"] = int(index)  # tables of text have no numbers
    kept |= {name: text for name, text in zip(CARRIED_COLUMNS, carried, strict=False) if text is not None}
    own_id = source_id(row, where, ("prompt_id",)) or prompt_hash(conversations["chosen"][:-1], *carried)
    return kept | conversations | {"prompt_id": own_id}


def _finish_reasons(row: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the finish reasons of a row's responses in this project's words: ``stop`` and ``length``."""
    found = {}
    for name in FINISH_COLUMNS & row.keys():
        value = str(row[name]).strip().lower()
        if value not in CUT_OFF | ENDED:
            raise InputError(
                f"{where} has '{name}' {row[name]!r}: write 'stop', or 'length' for a response that was cut off"
            )
        found[name] = "length" if value in CUT_OFF else "stop"
    return found


def _check_others(record: Record, where: str, notes: RowNotes) -> None:
    """Check every column that has not been used: those of one response, and all others."""
    for name in (*REASONING_KEYS, *LABEL_COLUMNS):
        if not is_empty(record.row.get(name)):
            raise InputError(
                f"{where} has '{name}' beside 'chosen' and 'rejected', of which it may belong to either: write thoughts into "
                "the turns, and remove labels"
            )
    for name, value in record.row.items():
        if not (side := _side_of(name)) or name in OWN_TYPES or is_empty(value):
            continue
        if not _is_number(value):
            check_column(name, value, where)
            own = name.removeprefix(f"{side}_") if side in SIDES else ""
            is_text = isinstance(value, str) and (own in _TEXTS_OF_ROWS or any(map(_forbids(value), refusals_of(own))))
            if isinstance(value, list | tuple | Mapping) or is_text:
                raise InputError(
                    f"{where} has '{name}', which may change how the response is trained: write it in a form that "
                    "docs/data_format.md lists, or remove the column"
                )
            notes.ignored.add(name)
    for name, value in record.row.items():
        check_pair_column(name, value, where)
    other_columns(record, where, notes)
    check_turn_keys(record, where, notes)


def _forbids(value: Any) -> Callable[[Refusal], bool]:
    return lambda refusal: not refusal.allows(value)


def check_own_columns(rows: Iterable[tuple[str, Mapping[str, Any]]], names: Iterable[str]) -> None:
    """Check the columns that rows in the project's own format have beyond it.

    Args:
        rows: pairs of a row's place and the row; only read if some column needs a look at its values.

    Raises:
        InputError: a column would change what is trained; it is named.
    """
    suspect = suspect_columns(names)
    for where, row in rows if suspect else ():
        for name in suspect:
            if not (_side_of(name) and _is_number(row[name])):
                check_column(name, row[name], where)
            check_pair_column(name, row[name], where)


def suspect_columns(names: Iterable[str]) -> list[str]:
    """Return the columns that are not the project's own and whose values decide whether they change what is trained."""
    known = {*OWN_TYPES, *CARRIED_COLUMNS}
    return [name for name in names if name not in known and (refusals_of(name) or pair_refusals_of(name))]


def _side_of(name: str) -> str | None:
    return next((side for side in (*SIDES, INITIAL) if name.startswith(f"{side}_")), None)


def _label_columns(rows: Sequence[Mapping[str, Any]], notes: RowNotes) -> list[str]:
    """Return the columns ``chosen_X`` and ``rejected_X`` that have a number, or nothing, in every row: labels of a response.

    Raises:
        InputError: there is a number for one of the responses only, or not in every row.
    """
    names = {name for row in rows for name in row if name.startswith(tuple(f"{side}_" for side in SIDES))}
    names -= OWN_TYPES.keys()
    numbers = {name for name in names if all(_is_number(row.get(name), null=True) for row in rows)}
    labels = {name for name in numbers if {f"{side}_{name.partition('_')[2]}" for side in SIDES} <= numbers}
    for name in sorted(names - labels):
        if any(_is_number(row.get(name)) for row in rows):
            raise InputError(
                f"the column '{name}' has numbers, but is no label of both responses: give chosen_X and rejected_X numbers "
                "in every row, or remove the column"
            )
    notes.labels |= {name.partition("_")[2] for name in labels}
    return sorted(labels)


def _is_number(value: Any, null: bool = False) -> bool:
    return (null and value is None) or (isinstance(value, int | float) and not isinstance(value, bool))


def check_pair(chosen: Any, rejected: Any, where: str, own_chosen: bool = False) -> None:
    """Check one pair: two conversations that differ only in their last (assistant) turn.

    A response generated by a model (``rejected``, and ``chosen`` with ``own_chosen``) may be empty: the model may have
    answered with EOS alone.

    Raises:
        InputError: the check failed; the error names ``where`` and the reason.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
            raise InputError(f"{where}: '{name}' must contain turns with 'role' and 'content': convert the data again")
    if own_chosen and chosen and chosen[-1]["content"] == "":
        # A placeholder, because the row contract does not allow an empty turn.
        check_conversation([*chosen[:-1], {**chosen[-1], "content": "EOS"}], where)
    else:
        check_conversation(chosen, where)
    if not rejected or rejected[-1]["role"] != "assistant" or _prompt(chosen) != _prompt(rejected):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' do not share a prompt: they must differ only in the last turn"
        )
    if not isinstance(rejected[-1]["content"], str):
        raise InputError(f"{where}: the rejected response is not text: convert the data again")
    if not all(map(is_unicode, turn_texts(rejected[-1]))):
        raise InputError(
            f"{where}: the rejected response has an unpaired surrogate (half a character): correct the row"
        )


def _prompt(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [present_fields(turn) for turn in [*messages][:-1]]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and {"role", "content"} <= turn.keys()
