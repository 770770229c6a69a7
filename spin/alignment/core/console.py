"""What a program tells the person at the terminal: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write a line to standard output at once, so that it keeps its place among the lines of child programs."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say_error(line: str) -> None:
    """Write a line to standard error: errors, warnings and progress, which must not mix with results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
