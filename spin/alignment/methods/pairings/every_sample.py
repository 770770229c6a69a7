"""SPPO's online form: every response is trained on separately with its reward, two per row; no side is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spin.alignment.methods.pairings.base import Labelled, own_pair
from spin.alignment.methods.soft_mean import soft_mean


@dataclass(frozen=True)
class EverySample(Labelled):
    """Rows of two responses, so that every response of a run counts equally.

    If the number of responses per prompt is even, they are taken in twos: the first and second, the third and fourth, ... If it
    is odd, in a ring: the first and second, the second and third, ..., the last and first. Each is then in two rows, which
    doubles its tokens in training; one response alone is both sides of its row.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See :meth:`Labelled.__call__`. The loss of a row is the mean of those of its two responses."""
        known = self.known(rows)
        if len(known) < self.min_samples:
            return []
        return every_sample(known, in_ring=len(rows) % 2 == 1)

    @property
    def counts_unpaired(self) -> bool:
        return True

    def unpaired(self, rows: Sequence[dict[str, Any]]) -> int:
        """Return the number of scored responses to one prompt (0 or 1) that are left over: the last of an odd number of them,
        where the scorer failed on some of an even number of responses."""
        return len(self.known(rows)) % 2 if len(rows) % 2 == 0 else 0

    def for_baseline(self, baseline: str) -> EverySample:
        """Relative to the batch, a single response to a prompt has a reward; relative to the prompt, it is always 0."""
        return replace(self, min_samples=1) if baseline == "batch" else self


def every_sample(rows: Sequence[dict[str, Any]], in_ring: bool = False) -> list[dict[str, Any]]:
    """Return the responses in twos, or each with the next one and the last with the first; rewards are scores minus their soft
    mean over the prompt."""
    baseline = soft_mean([float(row["rejected_score"]) for row in rows])
    following = [*rows[1:], *rows[:1]]
    places = range(0, len(rows), 1) if in_ring else range(0, len(rows) - 1, 2)
    pairs = []
    for first, second in ((rows[place], following[place]) for place in places):
        rewards = {
            "chosen_reward": first["rejected_score"] - baseline,
            "rejected_reward": second["rejected_score"] - baseline,
        }
        pairs.append(own_pair(first, second) | rewards)
    return pairs
