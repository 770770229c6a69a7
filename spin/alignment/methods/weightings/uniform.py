"""All tokens have weight 1, which makes WSPIN the same as SPIN."""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens


def uniform(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return 1.0 for each token of both responses."""
    return [1.0] * len(pair.chosen_ids), [1.0] * len(pair.rejected_ids)
