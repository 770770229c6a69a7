"""Instructions on the form of a response: lists, JSON, highlighted words, fixed options."""

from __future__ import annotations

import json
import re

from spin.alignment.rewards.instructions.counts import lines_of

_BULLET = re.compile(r"[-*•]\s+\S")
_NUMBER = re.compile(r"(\d+)[.)]\s+\S")
_BOLD = re.compile(r"\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)


def bullets(response: str, *, count: int) -> bool:
    """Exactly ``count`` bullet points: lines that begin with ``-``, ``*`` or ``•`` and a space."""
    return sum(bool(_BULLET.match(line)) for line in lines_of(response)) == count


def numbered_list(response: str, *, count: int) -> bool:
    """A list numbered from 1 to ``count`` in order, one item a line; other lines may stand around it."""
    found = [match for line in lines_of(response) if (match := _NUMBER.match(line))]
    return [int(match[1]) for match in found] == list(range(1, count + 1))


def bold(response: str, *, count: int) -> bool:
    """At least ``count`` parts in bold: ``**like this**``."""
    return len(_BOLD.findall(response)) >= count


def json_object(response: str, *, keys: list[str]) -> bool:
    """One JSON object with exactly these keys, by itself or in a code block."""
    fenced = _FENCE.fullmatch(response)
    try:
        found = json.loads(fenced[1] if fenced else response)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and sorted(found) == sorted(keys)


def answer_option(response: str, *, options: list[str]) -> bool:
    """Exactly one of ``options``, and nothing else; a full stop after it does not count."""
    return response.removesuffix(".") in {option.removesuffix(".") for option in options}
