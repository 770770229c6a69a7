"""Small formulas that several packages need. Plain numbers in float64, no torch."""

from __future__ import annotations

import math


def sigmoid(value: float) -> float:
    """Return ``1 / (1 + exp(-value))`` without overflow; ``sigmoid(x) + sigmoid(-x)`` is 1."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return 1 - 1 / (1 + math.exp(value))
