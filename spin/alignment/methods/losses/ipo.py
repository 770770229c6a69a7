"""The squared loss of IPO (arXiv 2310.12036, eq. 17): it pulls the margin towards 1 / (2 beta) instead of infinity."""

from __future__ import annotations

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, kl_penalty, outputs, sequence_logratios


def ipo(inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False, alpha: float = 0.0) -> LossOutputs:
    """Return ``(m - 1 / (2 beta))^2`` for the margin ``m`` of log-ratios (nats, summed unless length-normalised), minus the
    KL term weighted by ``alpha``.
    """
    chosen, rejected = sequence_logratios(inputs, length_normalize)
    margin = chosen - rejected - kl_penalty(inputs, alpha, length_normalize)
    losses = (margin - 1 / (2 * beta)) ** 2
    return outputs(losses, chosen, rejected, beta)
