"""SPPO's reward baseline (arXiv 2405.00675): the log-partition function subtracted in eq. 3.5, estimated from samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def soft_mean(rewards: Tensor | Sequence[float], b: float = 1.0, dim: int = -1) -> Any:
    """Return ``(1/b) log mean exp(b r)`` of a list of numbers, or along a dimension of a tensor.

    At ``b = 0`` it is the limit, the arithmetic mean. Eq. 3.5 has ``b = 1`` (eta = 1); a larger ``b`` moves it to the maximum.
    """
    if isinstance(rewards, Sequence):
        if b == 0:
            return math.fsum(rewards) / len(rewards)
        top = max(rewards)  # subtracted before exponentiating to avoid overflow
        return top + math.log(math.fsum(math.exp(b * (reward - top)) for reward in rewards) / len(rewards)) / b
    if b == 0:
        return rewards.mean(dim=dim)
    return ((b * rewards).logsumexp(dim=dim) - math.log(rewards.shape[dim])) / b
