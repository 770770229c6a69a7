"""What every token weighting returns. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Weighting(Protocol):
    """Gives each token of a response a weight of 0 or more, the end-of-turn token included."""

    def __call__(self, token_ids: Sequence[int]) -> list[float]: ...
