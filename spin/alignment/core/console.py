"""Terminal output: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write a line to standard output and flush it, so that it stays in order with the output of child programs."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say_error(line: str) -> None:
    """Write a line to standard error: errors, warnings and progress, which must not mix with results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
