"""The exception for errors the user can fix, and registry lookup that lists the valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from spin.alignment.core.text import printable

T = TypeVar("T")


class InputError(ValueError):
    """Bad input or configuration: one sentence that names the file, row or key, and the fix.

    Programs print it on stderr and exit with code 2. Half a character that the input contains is escaped, because messages are
    also written to files.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` with the closest valid name, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``registry[name]``; raise :class:`InputError` listing the valid names if it is unknown."""
    if name not in registry:
        raise InputError(f"unknown {kind} '{name}': choose one of {', '.join(sorted(registry))}")
    return registry[name]
