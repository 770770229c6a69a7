"""Online DPO's pairing: the highest-scoring of the model's own responses against the lowest-scoring one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import best, own_pair


def best_vs_worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none if all scores are equal. The first of equally good (or bad) responses is used."""
    better = best(rows)
    worse = min(rows, key=lambda row: float(row["rejected_score"]))
    return [own_pair(better, worse)] if better["rejected_score"] > worse["rejected_score"] else []
