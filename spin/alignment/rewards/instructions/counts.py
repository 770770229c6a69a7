"""Instructions on the number of words, sentences, lines and paragraphs. Every count of a response is exact."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")
# A sentence ends with one of these marks, also inside closing quotes or brackets, before white space or the end.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_]*(?=\s|$)")
# Abbreviations and numbers of a list end with a point, but not a sentence.
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc(?=\.\s[a-z])|e\.g|i\.e|approx|No)|(?:^|\n)\s*\d+)\.(?=\s)", re.IGNORECASE
)


def words_of(response: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, with the hyphens, apostrophes and points inside them."""
    return _WORD.findall(response)


def at_most_words(response: str, *, count: int) -> bool:
    """At most ``count`` words."""
    return len(words_of(response)) <= count


def at_least_words(response: str, *, count: int) -> bool:
    """At least ``count`` words."""
    return len(words_of(response)) >= count


def sentences(response: str, *, count: int) -> bool:
    """Exactly ``count`` sentences; words after the last end mark are one more."""
    text = _NO_END.sub(lambda found: found[0][:-1], response)
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(words_of(rest)) == count


def lines(response: str, *, count: int) -> bool:
    """Exactly ``count`` lines, not counting empty ones."""
    return len(lines_of(response)) == count


def paragraphs(response: str, *, count: int) -> bool:
    """Exactly ``count`` paragraphs, separated by empty lines."""
    return len([part for part in re.split(r"\n\s*\n", response) if part.strip()]) == count


def lines_of(response: str) -> list[str]:
    """Return the lines of a text that are not empty, without white space around them."""
    return [line.strip() for line in response.splitlines() if line.strip()]
