"""The logistic loss of SPIN (arXiv 2401.01335, eq. 4.7 with l(u) = log(1 + exp(-u))) and DPO, with label smoothing."""

from __future__ import annotations

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, kl_penalty, outputs, sequence_logratios


def sigmoid(
    inputs: LossInputs,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    alpha: float = 0.0,
) -> LossOutputs:
    """Return ``-(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)`` for the margin ``m`` of log-ratios (nats), minus the
    KL term weighted by ``alpha``; ``s`` is ``label_smoothing``.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected = sequence_logratios(inputs, length_normalize)
    logits = beta * (chosen - rejected - kl_penalty(inputs, alpha, length_normalize))
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return outputs(losses, chosen, rejected, beta)
