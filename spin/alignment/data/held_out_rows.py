"""Held-out rows: a row that cannot be used is skipped and named, because a single bad row must not end an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.columns import RowNotes
from spin.alignment.data.formats import to_conversations
from spin.alignment.data.fractions import fraction_rows
from spin.alignment.data.source_files import read_records

# A skipped row: ``prompt_id`` (its place in the file if it has none) and ``reason``.
Skipped = dict[str, str]


def read_held_out(
    source: str, split: str, limit: int = 0, ground_truth_required: bool = True
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Return the usable prompt rows of a split, as ``stream_prompts`` yields them, and those skipped.

    With a ``limit``, that many of the usable rows are drawn with a fixed seed.

    Raises:
        InputError: the source cannot be read, or none of its rows can be used.
    """
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[Skipped] = []
    notes = RowNotes()
    for where, record in read_records(source, split):
        own_id = record.get("prompt_id", record.get("id"))
        name = where if own_id in (None, "") else str(own_id)
        try:
            conversations = to_conversations(record, where, ground_truth_required=ground_truth_required, notes=notes)
        except InputError as error:
            skipped.append({"prompt_id": name, "reason": str(error)})
            continue
        for conversation in conversations:
            if conversation.prompt_id in rows:
                reason = f"{where} has the prompt id of an earlier row"
                skipped.append({"prompt_id": conversation.prompt_id, "reason": reason})
            else:
                rows[conversation.prompt_id] = conversation.row()
    notes.tell(source)
    usable = list(rows.values())
    check_any_left(usable, skipped, f"{source}, split {split}")
    if limit and limit < len(usable):
        usable = [usable[index] for index in fraction_rows(len(usable), 0, limit)]
    return usable, skipped


def read_to_score(
    source: str, split: str, compares: bool, limit: int = 0
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Return :func:`read_held_out` for a metric that ``compares`` responses with the ground truth, or does not.

    A data set in which no row has a ground truth is used as it is if the metric needs none. In any other, a row without one is
    skipped: it is more likely to be damaged.

    Raises:
        InputError: as :func:`read_held_out`.
    """
    try:
        return read_held_out(source, split, limit)
    except InputError:
        if compares:
            raise
        return read_held_out(source, split, limit, ground_truth_required=False)


def check_any_left(rows: Sequence[Any], skipped: Sequence[Skipped], source: str) -> None:
    """Check that at least one held-out row remains.

    Raises:
        InputError: none does; the message gives the reason of the first.
    """
    if not rows:
        first = skipped[0]["reason"] if skipped else "it has no rows"
        raise InputError(f"no held-out row of {source} can be used: {first}")


def describe_skipped(skipped: Sequence[Skipped], most: int = 5) -> list[str]:
    """Return a line with the number of skipped held-out rows, and one for each of the first few; none if there are none."""
    if not skipped:
        return []
    lines = [f"{len(skipped)} held-out rows skipped:"]
    lines += [f"  {item['prompt_id']}: {item['reason']}" for item in skipped[:most]]
    return lines + ([f"  ... and {len(skipped) - most} more"] if len(skipped) > most else [])
