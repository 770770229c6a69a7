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
    """Results before any mean; the implicit rewards (nats, times beta) have shape ``(B,)`` and are detached.

    ``losses`` has shape ``(B,)``, or ``(2B,)`` where a loss has one for each response: its pair then costs their mean.
    """

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
    ratios = inputs.policy_logps.double() - inputs.reference_logps.double()
    chosen, rejected = _weighted_sums(ratios, inputs, length_normalize).chunk(2)
    return chosen, rejected


def kl_penalty(inputs: LossInputs, alpha: float, length_normalize: bool = False) -> Tensor | float:
    """Return ``alpha (sum_t w_t KL_t(chosen) - sum_t w_t KL_t(rejected))``, of shape ``(B,)``; 0 at ``alpha = 0``.

    The weighted sequence-KL term that TIS-DPO (arXiv 2410.04350) takes off the margin of log-ratios.

    Raises:
        ValueError: ``alpha`` is not 0 and the inputs have no ``position_kl``.
    """
    if not alpha:
        return 0.0
    if inputs.position_kl is None:
        raise ValueError(f"alpha is {alpha}, but these inputs have no position_kl: set alpha to 0")
    chosen, rejected = _weighted_sums(inputs.position_kl.double(), inputs, length_normalize).chunk(2)
    return alpha * (chosen - rejected)


def _weighted_sums(streams: Tensor, inputs: LossInputs, length_normalize: bool) -> Tensor:
    mask = inputs.completion_mask.double()
    weights = mask if inputs.weights is None else inputs.weights.double() * mask
    totals = (streams.masked_fill(mask == 0, 0.0) * weights).sum(dim=-1)
    return totals / mask.sum(dim=-1) if length_normalize else totals


def outputs(losses: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> LossOutputs:
    """Return the losses with the implicit rewards ``beta * logratio``."""
    return LossOutputs(losses, (beta * chosen).detach(), (beta * rejected).detach())
