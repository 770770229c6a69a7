"""What every pairing receives and returns. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class Pairing(Protocol):
    """Turns the generated rows of ONE prompt into preference rows (none on a tie).

    A plain function is a pairing. The pairs have the columns of the rows.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class EveryRow:
    """A pairing whose pairs are the rows themselves: all of them, unchanged and in order.

    Gathering reads ``keeps_rows`` and then moves whole record batches, never a Python row.
    """

    pair: Pairing
    keeps_rows: ClassVar[bool] = True

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.pair(rows)
