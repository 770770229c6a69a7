"""SPPO's pairing (arXiv 2405.00675, Algorithm 1): the responses of the highest and the lowest win rate, with their rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spin.alignment.core.arithmetic import sigmoid
from spin.alignment.core.errors import InputError
from spin.alignment.methods.pairings.base import own_pair

# Win rates closer than this differ by rounding only.
_EQUAL = 1e-12


def win_rate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none when all win rates are equal. Of equal best (or worst) responses the first is taken.

    A response's win rate is the mean over all K responses, itself (1/2) included, of the probability that it beats them:
    the paper's estimate of ``P(y beats pi_t | x)``. Probabilities come from ``win_probs`` where a preference model gave
    them, else from ``sigmoid(s_i - s_k)``.

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
    """Return ``[i][k]``, the probability that response ``i`` beats response ``k``, for the rows in their order."""
    given = [row.get("win_probs") for row in rows]
    if all(line is None for line in given):
        scores = [float(row["rejected_score"]) for row in rows]
        return [[sigmoid(ours - theirs) for theirs in scores] for ours in scores]
    samples = [int(row["sample_index"]) for row in rows]
    if any(line is None or len(line) <= max(samples) for line in given):
        raise InputError(
            f"only some responses to prompt {rows[0]['prompt_id']} have win probabilities: score them again"
        )
    return [[float(line[sample]) for sample in samples] for line in given if line is not None]
