"""The one error a user can mend, and the one way to look a name up in a registry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input or configuration: one sentence that names the file, row or key, and the mend.

    Programs print it on stderr and end with exit code 2.
    """


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``registry[name]``; raise :class:`InputError` listing the valid names when it is unknown."""
    if name not in registry:
        raise InputError(f"unknown {kind} '{name}': choose one of {', '.join(sorted(registry))}")
    return registry[name]
