"""T-SPIN (arXiv 2601.08198): triplets of the ground truth, the opponent's response and one of the initial model; no reference."""

from __future__ import annotations

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, outputs, sequence_logps


def tspin(
    inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False, historical_weight: float = 1.0
) -> LossOutputs:
    """Return ``-log sigmoid(r_w - r_l) - v log sigmoid(r_l - r_0)`` with the rewards ``r = beta log pi(y|x)``, ``v`` the
    ``historical_weight``.

    The first term is SPIN's, the current advantage of the chosen response over the opponent's. The second is the historical
    advantage of the opponent's response over that of the initial model (response ``initial``): it is still there when the first
    has vanished. The entropy constraint that replaces SPIN's KL constraint makes the reward the log-prob under the policy alone,
    so nothing of it is left to be added here, and no reference model is needed.

    Only the description of the method was at hand, not the paper's settings. This reading: the logistic loss on both terms,
    one scale ``beta`` for both, log-probs summed over the response (nats) as in SPIN unless ``length_normalize`` averages them,
    equal weight of the terms. Token weights apply to the sums.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected, initial = sequence_logps(inputs, length_normalize)
    losses = -logsigmoid(beta * (chosen - rejected)) - historical_weight * logsigmoid(beta * (rejected - initial))
    return outputs(losses, chosen, rejected, beta)
