"""The squared loss of IPO (arXiv 2310.12036, eq. 17): the margin is pulled to 1 / (2 beta), not to infinity."""

from __future__ import annotations

from spin.alignment.losses.base import LossInputs, LossOutputs, outputs, sequence_logratios


def ipo(inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False) -> LossOutputs:
    """Return ``(m - 1 / (2 beta))^2`` for the margin ``m`` of log-ratios (nats, summed unless length-normalised)."""
    chosen, rejected = sequence_logratios(inputs, length_normalize)
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return outputs(losses, chosen, rejected, beta)
