"""SWIFT (WSPIN, NeurIPS 2025): compares a stronger teacher with the student. Tokenizers may differ (``align_tokens.py``).

``d_t = log pi_teacher(y_t) - log pi_student(y_t)``, where the teacher's log-prob is that of the student token's characters.
"""

from __future__ import annotations

from spin.alignment.methods.weightings.base import PairTokens, turned_gains


def teacher(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return the gains, negated for the rejected response."""
    return turned_gains(pair)
