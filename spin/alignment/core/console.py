"""Terminal output: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from typing import TextIO

from spin.alignment.core.text import printable


def say(line: str) -> None:
    """Write a line to standard output and flush it, so that it stays in order with the output of child programs."""
    _write(sys.stdout, line)


def say_error(line: str) -> None:
    """Write a line to standard error: errors, warnings and progress, which must not mix with results."""
    _write(sys.stderr, line)


def _write(stream: TextIO, line: str) -> None:
    # A terminal may lack characters of the data (LANG=C), and the data may contain half a character.
    stream.write(printable(line, getattr(stream, "encoding", None) or "utf-8") + "\n")
    stream.flush()
