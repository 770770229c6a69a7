"""T-SPIN (arXiv 2601.08198): triplets of ground truth, opponent's response and initial model's response; reference-free."""

from __future__ import annotations

from spin.alignment.methods.losses.base import LossInputs, LossOutputs, outputs, sequence_logps


def tspin(
    inputs: LossInputs, beta: float = 0.1, length_normalize: bool = False, historical_weight: float = 1.0
) -> LossOutputs:
    """Return ``-log sigmoid(r_w - r_l) - v log sigmoid(r_l - r_0)`` with rewards ``r = beta log pi(y|x)`` and ``v`` the
    ``historical_weight``.

    The first term, the current advantage of the chosen response over the opponent's, is the one in SPIN. The second is the
    historical advantage of the opponent's response over that of the initial model (response ``initial``), which remains when the
    first vanishes. With the entropy constraint that replaces SPIN's KL constraint, the reward is the log-prob under the policy
    alone, so the constraint adds no term to the loss and no reference model is needed.

    This implementation is based on the description of the method, not on the paper's settings. It assumes the logistic loss and
    the same scale ``beta`` for both terms, log-probs summed over the response (nats) as in SPIN unless ``length_normalize``
    averages them, and equal weights of the terms. Token weights apply to the sums.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected, initial = sequence_logps(inputs, length_normalize)  # (B,) each
    # The opponent's response is pushed down by the first term and, against the initial model's, up by the second.
    losses = -logsigmoid(beta * (chosen - rejected)) - historical_weight * logsigmoid(beta * (rejected - initial))
    return outputs(losses, chosen, rejected, beta)
