"""TIS-DPO's own files (exlaw/TIS-DPO): the gains of tokens were computed elsewhere and come with the pairs."""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens, turned_gains


def stored_gains(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return the gains, negated for the rejected response."""
    return turned_gains(pair)
