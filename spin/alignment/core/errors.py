"""The exception for errors the user can fix, and registry lookup that lists the valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from spin.alignment.core.text import printable

T = TypeVar("T")
# A value is quoted in messages up to this length.
_SHOWN = 120


class InputError(ValueError):
    """Bad input or configuration: one sentence that names the file, row or key, and the fix.

    Programs print it on stderr and exit with code 2. Half a character that the input contains is escaped, because messages are
    also written to files.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NotFiniteError(InputError, FloatingPointError):
    """A loss, gradient, log-prob or weight is NaN or infinite: what it was computed from must not be used any further.

    ``rows`` are the encoded rows that it was computed from, as far as they are known.
    """

    def __init__(self, sentence: str, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(sentence)
        self.rows = tuple(rows)


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` with the closest valid name, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(value: Any) -> str:
    """Return a value as it is quoted in a message: one line, shortened if it is long."""
    if value is None:
        return "empty"
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}... ({len(text)} characters)"


def reason_of(error: BaseException) -> str:
    """Return the message of another library's exception as a phrase: one line, without a full stop at its end."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``registry[name]``; raise :class:`InputError` listing the valid names if it is unknown."""
    if not isinstance(name, str) or name not in registry:
        raise InputError(f"unknown {kind} {shown(name)}: choose one of {', '.join(sorted(registry))}")
    return registry[name]
