"""Instructions on single words. Words are compared whole and without regard to case."""

from __future__ import annotations

import re


def includes(response: str, *, word: str, count: int = 1) -> bool:
    """Contains a word or phrase at least ``count`` times."""
    return len(occurrences(response, word)) >= count


def excludes(response: str, *, words: list[str]) -> bool:
    """Contains none of some words or phrases."""
    return not any(occurrences(response, word) for word in words)


def occurrences(text: str, word: str) -> list[str]:
    """Return each place where a word or phrase stands by itself, not as part of a longer word."""
    return re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
