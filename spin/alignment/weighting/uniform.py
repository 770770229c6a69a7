"""Every token counts the same: SPIN is WSPIN with weight 1."""

from __future__ import annotations

from collections.abc import Sequence


def uniform(token_ids: Sequence[int]) -> list[float]:
    """Return 1.0 for each token."""
    return [1.0] * len(token_ids)
