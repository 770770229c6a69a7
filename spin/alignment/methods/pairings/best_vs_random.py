"""The best of the model's own responses against a random one with a lower score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import best, own_pair


def best_vs_random(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none if all scores are equal. The draw depends only on the prompt id, so it is reproducible."""
    better = best(rows)
    lower = [row for row in rows if row["rejected_score"] < better["rejected_score"]]
    return [own_pair(better, random.Random(str(better["prompt_id"])).choice(lower))] if lower else []
