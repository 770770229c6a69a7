"""What every loss receives and returns, and the sums they share. Pure tensors: no model, no I/O, no project imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


# A loss is a pure function of LossInputs; its keyword arguments are the settings it knows.
Loss = Callable[..., LossOutputs]


def sequence_logratios(inputs: LossInputs, length_normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return the weighted log-ratios ``sum_t w_t (log pi(y_t) - log pi_ref(y_t))`` of both halves, each of shape ``(B,)``.

    Differences are taken per token and summed in float64: two sequence sums near -2500 nats would cancel in float32.
    ``length_normalize`` divides by the number of completion tokens.
    """
    mask = inputs.completion_mask.double()
    weights = mask if inputs.weights is None else inputs.weights.double() * mask
    ratios = (inputs.policy_logps.double() - inputs.reference_logps.double()).masked_fill(mask == 0, 0.0)
    totals = (ratios * weights).sum(dim=-1)
    if length_normalize:
        totals = totals / mask.sum(dim=-1)
    chosen, rejected = totals.chunk(2)
    return chosen, rejected


def outputs(losses: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> LossOutputs:
    """Return per-pair losses with the implicit rewards ``beta * logratio``."""
    return LossOutputs(losses, (beta * chosen).detach(), (beta * rejected).detach())
