"""SPACE (arXiv 2512.07175): noise-contrastive self-play, which classifies each response as real or generated."""

from __future__ import annotations

import math

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, outputs, sequence_logratios


def space(inputs: LossInputs, beta: float = 0.1, noise_ratio: float = 1.0) -> LossOutputs:
    """Return ``-log sigma_mu(r_w) - mu log sigma_{1/mu}(-r_l)`` with ``sigma_mu(r) = 1 / (1 + mu exp(-r))``, the paper's L_Space.

    ``r`` are log-ratios (nats) of policy and reference; ``mu`` (``noise_ratio``) is the number of generated responses per real
    one. Since ``sigma_mu(r) = sigmoid(r - log mu)``, this equals
    ``-log sigmoid(r_w - log mu) - mu log sigmoid(log mu - r_l)``. ``beta`` scales only the logged rewards.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected = sequence_logratios(inputs)
    shift = math.log(noise_ratio)
    losses = -logsigmoid(chosen - shift) - noise_ratio * logsigmoid(shift - rejected)
    return outputs(losses, chosen, rejected, beta)
