"""SPPO's pairing (arXiv 2405.00675, Algorithm 1): the responses with the highest and the lowest win rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spin.alignment.core.arithmetic import sigmoid
from spin.alignment.core.errors import InputError
from spin.alignment.methods.pairings.base import own_pair

# Win rates closer than this differ only by rounding.
_EQUAL = 1e-12


def win_rate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none if all win rates are equal. The first of equally good (or bad) responses is used.

    A response's win rate is the mean, over all K responses including itself (1/2), of the probability that it beats them:
    the paper's estimate of ``P(y beats pi_t | x)``. Probabilities are taken from ``win_probs`` if a preference model provided
    them, else computed as ``sigmoid(s_i - s_k)``.

    Raises:
        InputError: only some responses of the prompt have win probabilities.
    """
    matrix = win_probabilities(rows)
    rates = [math.fsum(line) / len(line) for line in matrix]
    better, worse = rates.index(max(rates)), rates.index(min(rates))
    if rates[better] - rates[worse] <= _EQUAL:
        return []
    wins = matrix[better][worse]
    rated = {"chosen_win_prob": rates[better], "rejected_win_prob": rates[worse]}
    return [
        own_pair(rows[better], rows[worse]) | rated | {"chosen_pair_win_prob": wins, "rejected_pair_win_prob": 1 - wins}
    ]


def win_probabilities(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return a K x K matrix ``[i][k]``: the probability that response ``i`` beats response ``k``, in the order of the rows."""
    given = [row.get("win_probs") for row in rows]
    if all(line is None for line in given):
        scores = [float(row["rejected_score"]) for row in rows]
        return [[sigmoid(ours - theirs) for theirs in scores] for ours in scores]
    samples = [int(row["sample_index"]) for row in rows]
    if any(line is None or len(line) <= max(samples) for line in given):
        raise InputError(
            f"only some responses to prompt {rows[0]['prompt_id']} have win probabilities: score them again"
        )
    # Rows that the scorer failed on are missing here, so the matrix of all samples is restricted to the others.
    return [[float(line[sample]) for sample in samples] for line in given if line is not None]
