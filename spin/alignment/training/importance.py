"""The importance of responses that were sampled with other weights, or another program, than the policy in training.

A response y has the ratio pi(y) / mu(y), where pi is the policy and mu the sampler, according to the log-probs it reported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spin.alignment.methods.losses import LossInputs, LossOutputs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

# Ratios beyond e**20 are not told apart, so that sums stay finite.
_LARGEST_LOG = 20.0


def token_logratios(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return ``log pi - log mu`` of every token, float64 nats of shape ``(2B, T)``, and which tokens the sampler sampled.

    The log-ratio of other tokens (of the ground truth, and padding) is 0.
    """
    assert inputs.sampler_logps is not None
    sampled = inputs.completion_mask.bool() & ~torch.isnan(inputs.sampler_logps)  # (2B, T)
    difference = inputs.policy_logps.detach().double() - inputs.sampler_logps.double()
    return difference.masked_fill(~sampled, 0.0), sampled


def ratios(inputs: LossInputs, values: int) -> Tensor:
    """Return the ratio for each of ``values`` values of a loss: 2B (one per response) or B (one per pair, of both responses)."""
    logratios, _ = token_logratios(inputs)
    summed = logratios.sum(dim=-1)  # (2B,)
    if values != len(summed):
        summed = torch.stack(inputs.split(summed)).sum(dim=0)  # (B,)
    return summed.clamp(max=_LARGEST_LOG).exp()


class Importance:
    """Reports how far the sampler is from the policy and, with a ``cap``, corrects losses for it.

    The correction is truncated importance sampling (E. Ionides, 2008; arXiv 1802.01561): each value of the loss is multiplied by
    ``min(cap, ratio)``, where the ratio is the product over the sampled responses that the value depends on.
    """

    def __init__(self, cap: float | None) -> None:
        self.cap = cap
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []

    def correct(self, inputs: LossInputs, outputs: LossOutputs) -> LossOutputs:
        """Return the outputs with losses weighted, if there is a cap and the sampler's log-probs are known."""
        if self.cap is None or inputs.sampler_logps is None:
            return outputs
        weights = ratios(inputs, len(outputs.losses)).clamp(max=self.cap)
        return replace(outputs, losses=outputs.losses * weights.to(outputs.losses.dtype))

    @torch.no_grad()
    def add(self, inputs: LossInputs, values: int) -> None:
        """Add B pairs that are trained on, for whose loss there are ``values`` values."""
        if inputs.sampler_logps is None:
            return
        logratios, sampled = token_logratios(inputs)
        responses = sampled.any(dim=-1)  # (2B,)
        of_responses = ratios(inputs, len(responses))[responses]
        weights = ratios(inputs, values)
        clipped = weights > self.cap if self.cap is not None else torch.zeros_like(weights, dtype=torch.bool)
        terms = (
            of_responses.sum(),
            responses.sum(),
            -logratios.sum(),
            (torch.expm1(logratios) - logratios).sum(),
            sampled.sum(),
            clipped.sum(),
            torch.tensor(len(weights), device=weights.device),
        )
        self._sums.append(torch.stack([term.double() for term in terms]))
        if len(of_responses):
            self._largest.append(of_responses.max())

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics of all processes since the last call; empty if no sampled response was added.

        ``importance/mean`` and ``importance/max`` are of the ratios of responses. ``importance/kl`` and ``importance/kl_k1``
        estimate KL(sampler || policy) in nats per token, as the means of ``r - 1 - log r`` and of ``-log r`` with r = pi / mu
        ("k3" and "k1" of J. Schulman, "Approximating KL divergence", 2020). ``importance/clipped`` is the fraction of weights
        that the cap lowered. Every process must call it.
        """
        local = torch.stack(self._sums).sum(dim=0) if self._sums else torch.zeros(7, dtype=torch.float64)
        largest = torch.stack(self._largest).max() if self._largest else torch.zeros((), dtype=torch.float64)
        self._sums, self._largest = [], []
        # MPS has no float64.
        kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
        total = accelerator.reduce(local.to(accelerator.device, kind), reduction="sum").tolist()
        most = float(accelerator.gather(largest.to(accelerator.device, kind).reshape(1)).max())
        ratio_sum, responses, k1, k3, tokens, clipped, weights = total
        if not responses:
            return {}
        found = {
            "mean": ratio_sum / responses,
            "max": most,
            "kl": k3 / max(1.0, tokens),
            "kl_k1": k1 / max(1.0, tokens),
            **({"clipped": clipped / weights} if self.cap is not None else {}),
        }
        return {f"importance/{name}": value for name, value in found.items()}
