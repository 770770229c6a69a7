"""Online DPO's pairing: of the model's own responses, the one of the highest score against the one of the lowest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import best, own_pair


def best_vs_worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none when all scores are equal. Of equal best (or worst) responses the first is taken."""
    better = best(rows)
    worse = min(rows, key=lambda row: float(row["rejected_score"]))
    return [own_pair(better, worse)] if better["rejected_score"] > worse["rejected_score"] else []
