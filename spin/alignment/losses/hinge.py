"""The hinge loss offered by SPIN (arXiv 2401.01335, section 4: l(u) = max(0, 1 - u))."""

from __future__ import annotations

from spin.alignment.losses.base import LossInputs, LossOutputs, outputs, sequence_logratios


def hinge(inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False) -> LossOutputs:
    """Return ``max(0, 1 - beta m)`` for the margin ``m`` of log-ratios (nats)."""
    chosen, rejected = sequence_logratios(inputs, length_normalize)
    losses = (1 - beta * (chosen - rejected)).clamp(min=0)
    return outputs(losses, chosen, rejected, beta)
