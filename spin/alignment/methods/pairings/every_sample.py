"""SPPO's online form: every response is trained on by itself, two to a row, with its reward; no side is preferred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import OWN_CHOSEN, own_pair

REWARD_COLUMNS = (*OWN_CHOSEN, "chosen_reward", "rejected_reward")


def every_sample(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the responses two by two: the first and second, the third and fourth, ...; rewards are scores minus their
    soft-mean over the prompt.

    Where the scorer failed on an odd number of responses, the last of the others has no partner and is left out (counted by
    :meth:`Labelled.unpaired`).
    """
    baseline = soft_mean([float(row["rejected_score"]) for row in rows])
    pairs = []
    for first, second in zip(rows[0::2], rows[1::2], strict=False):
        rewards = {
            "chosen_reward": first["rejected_score"] - baseline,
            "rejected_reward": second["rejected_score"] - baseline,
        }
        pairs.append(own_pair(first, second) | rewards)
    return pairs


def soft_mean(scores: Sequence[float]) -> float:
    """Return ``log mean exp(s)``: SPPO's baseline (the log-partition of arXiv 2405.00675, eq. 3.5, at eta = 1)."""
    top = max(scores)
    return top + math.log(math.fsum(math.exp(score - top) for score in scores) / len(scores))
