"""Instructions on the beginning, the end and the frame of a response."""

from __future__ import annotations

from spin.alignment.rewards.instructions.counts import lines_of


def starts_with(response: str, *, text: str) -> bool:
    """Begins with exactly ``text``."""
    return response.startswith(text)


def ends_with(response: str, *, text: str) -> bool:
    """Ends with exactly ``text``."""
    return response.endswith(text)


def ends_with_question(response: str) -> bool:
    """Ends with a question mark."""
    return response.endswith("?")


def every_line_starts_with(response: str, *, text: str) -> bool:
    """Every line that is not empty begins with ``text``; there are at least two."""
    found = lines_of(response)
    return len(found) >= 2 and all(line.startswith(text) for line in found)


def quoted(response: str) -> bool:
    """The whole response stands between double quotation marks, and none is inside."""
    inner = response[1:-1]
    straight = response[:1] == '"' and response[-1:] == '"' and '"' not in inner
    curly = response[:1] == "“" and response[-1:] == "”" and "“" not in inner
    return len(response) > 2 and (straight or curly)


def title(response: str, *, opening: str, closing: str) -> bool:
    """The first line is a title between ``opening`` and ``closing``, and text follows it."""
    first, *rest = lines_of(response) or [""]
    inside = first[len(opening) : len(first) - len(closing)]
    framed = first.startswith(opening) and first.endswith(closing) and len(first) >= len(opening) + len(closing)
    return framed and bool(inside.strip()) and bool(rest)
