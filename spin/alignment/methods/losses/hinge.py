"""The hinge loss, one of SPIN's options (arXiv 2401.01335, section 4: l(u) = max(0, 1 - u))."""

from __future__ import annotations

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, kl_penalty, outputs, sequence_logratios


def hinge(inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False, alpha: float = 0.0) -> LossOutputs:
    """Return ``max(0, 1 - beta m)`` for the margin ``m`` of log-ratios (nats), minus the KL term weighted by ``alpha``."""
    chosen, rejected = sequence_logratios(inputs, length_normalize)
    margin = chosen - rejected - kl_penalty(inputs, alpha, length_normalize)
    losses = (1 - beta * margin).clamp(min=0)
    return outputs(losses, chosen, rejected, beta)
