"""Verifiable instructions: whether a response keeps constraints that can be checked exactly (no commas, three bullets, ...).

A row names its instructions in a column ``instructions``: a list of ``{"kind": NAME, "arguments": {...}}``, or its JSON text. A
kind is a function of the response and of keyword arguments in one of the files here, and a line in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spin.alignment.rewards.instructions.characters import lower_case, no_commas, no_digits, upper_case
from spin.alignment.rewards.instructions.counts import at_least_words, at_most_words, lines, paragraphs, sentences
from spin.alignment.rewards.instructions.degenerate import is_degenerate
from spin.alignment.rewards.instructions.forms import answer_option, bold, bullets, json_object, numbered_list
from spin.alignment.rewards.instructions.places import (
    ends_with,
    ends_with_question,
    every_line_starts_with,
    quoted,
    starts_with,
    title,
)
from spin.alignment.rewards.instructions.rows import read_instructions
from spin.alignment.rewards.instructions.words import excludes, includes

KINDS: dict[str, Callable[..., bool]] = {
    "answer_option": answer_option,
    "at_least_words": at_least_words,
    "at_most_words": at_most_words,
    "bold": bold,
    "bullets": bullets,
    "ends_with": ends_with,
    "ends_with_question": ends_with_question,
    "every_line_starts_with": every_line_starts_with,
    "excludes": excludes,
    "includes": includes,
    "json_object": json_object,
    "lines": lines,
    "lower_case": lower_case,
    "no_commas": no_commas,
    "no_digits": no_digits,
    "numbered_list": numbered_list,
    "paragraphs": paragraphs,
    "quoted": quoted,
    "sentences": sentences,
    "starts_with": starts_with,
    "title": title,
    "upper_case": upper_case,
}

# Kinds whose whole answer may be a word or two, so that a short response is no sign of evasion.
SHORT_ANSWERS = frozenset({"answer_option"})


def instructions(prompt: str, response: str, reference: str, instructions: Any, *, strict: int = 0) -> float:
    """Return the share of the row's instructions that a response follows, from 0 to 1.

    A degenerate response (``degenerate.py``) scores 0: an instruction such as "no commas" is easily kept by saying nothing.

    Args:
        instructions: the row's column of that name.
        strict: 1: the score is 1 if every instruction is followed, and otherwise 0.

    Raises:
        InputError: the column is not a list of known instructions.
    """
    asked = read_instructions(instructions, KINDS)
    if is_degenerate(response, may_be_short=any(item.kind in SHORT_ANSWERS for item in asked)):
        return 0.0
    followed = sum(KINDS[item.kind](response.strip(), **item.arguments) for item in asked)
    return float(followed == len(asked)) if strict else followed / len(asked)


def check_instructions(columns: Mapping[str, Any]) -> None:
    """Check the column ``instructions`` of a row, before a model is loaded.

    Raises:
        InputError: as :func:`instructions`.
    """
    read_instructions(columns["instructions"], KINDS)


__all__ = ["KINDS", "check_instructions", "instructions"]
