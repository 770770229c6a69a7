"""What every pairing receives and returns. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Pairing(Protocol):
    """Turns the generated rows of ONE prompt into preference rows (none on a tie)."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]: ...
