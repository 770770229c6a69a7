"""SWIFT (WSPIN, NeurIPS 2025): a stronger teacher against the student. Their tokenizers may differ (``align_tokens.py``).

``d_t = log pi_teacher(y_t) - log pi_student(y_t)``, the teacher's log-prob being that of the student token's characters.
"""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens, turned_gains


def teacher(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return the gains, their sign turned for the rejected response."""
    return turned_gains(pair)
