"""TIS-DPO (arXiv 2410.04350, section 4.3): compares a model trained on the pairs with one trained on the reversed pairs.

``d_t = log pi_plus(y_t) - log pi_minus(y_t)``: both models start from the same weights, so they differ only in what they learned
from the pairs.
"""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens, turned_gains


def reverse_dpo(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return the gains, negated for the rejected response."""
    return turned_gains(pair)
