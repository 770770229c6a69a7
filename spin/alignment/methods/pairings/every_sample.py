"""SPPO's online form: every response is trained on separately with its reward, two per row; no side is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import own_pair
from spin.alignment.methods.soft_mean import soft_mean


def every_sample(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the responses in twos: the first and second, the third and fourth, ...; rewards are scores minus their soft
    mean over the prompt.

    If the scorer failed on an odd number of responses, the last of the others has no partner and is skipped (counted by
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
