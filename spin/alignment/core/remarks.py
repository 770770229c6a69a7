"""Remarks about data, a line each: said once in a process, or kept to be stored with what was made from the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spin.alignment.core.console import say_error

_said: set[str] = set()
_kept: list[str] | None = None


def remark(line: str) -> None:
    """Write a line to standard error, unless this process has written it before or keeps it (:func:`kept_remarks`)."""
    if _kept is not None:
        _kept.append(line)
    elif line not in _said:
        _said.add(line)
        say_error(line)


@contextmanager
def kept_remarks() -> Iterator[list[str]]:
    """Collect the remarks made inside the context instead of writing them. An error that leaves it writes them first."""
    global _kept
    before, _kept = _kept, []
    found = _kept
    try:
        yield found
    except BaseException:
        _kept = before
        for line in found:
            remark(line)
        raise
    finally:
        _kept = before
