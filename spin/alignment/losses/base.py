"""What every loss receives and returns. Pure tensors: no model, no I/O, no project imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """Token streams of shape ``(2B, T)``: the chosen half, then the rejected half. Log-probabilities in nats.

    ``weights`` are token weights (``None``: 1 on every completion token), ``position_kl`` is KL(policy || reference)
    at each position in nats, ``win_probs`` and ``rewards`` have shape ``(2B,)``.
    """

    policy_logps: Tensor
    reference_logps: Tensor
    completion_mask: Tensor
    weights: Tensor | None = None
    position_kl: Tensor | None = None
    win_probs: Tensor | None = None
    rewards: Tensor | None = None


@dataclass(frozen=True)
class LossOutputs:
    """Per-pair results of shape ``(B,)`` before any mean; the implicit rewards (nats, times beta) are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Loss(Protocol):
    """A loss is a pure function of :class:`LossInputs` and keyword settings."""

    def __call__(self, inputs: LossInputs, **settings: float) -> LossOutputs: ...
