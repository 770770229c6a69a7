"""TIS-DPO (arXiv 2410.04350, section 4.3): a model trained on the pairs against one trained on the reversed pairs.

``d_t = log pi_plus(y_t) - log pi_minus(y_t)``: both models come from the same start, so what differs is what the pairs taught.
"""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens, turned_gains


def reverse_dpo(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return the gains, their sign turned for the rejected response."""
    return turned_gains(pair)
