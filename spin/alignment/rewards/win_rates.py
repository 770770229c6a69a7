"""Win probabilities and scores from judgements of pairs. Plain arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from spin.alignment.core.arithmetic import sigmoid
from spin.alignment.rewards.base import GroupLabels

Pair = tuple[int, int]


def both_orders(first: float | None, second: float | None) -> float | None:
    """Return the probability that ``a`` beats ``b`` from the judgements of (a, b) and of (b, a).

    ``first`` is the probability that ``a`` wins when shown first, ``second`` that ``b`` wins when shown first. Their mean
    cancels position bias. If only one is known, it is used alone; if neither, the result is ``None``.
    """
    if first is None or second is None:
        return first if second is None else 1.0 - second
    return 0.5 * (first + (1.0 - second))


def win_matrix(count: int, wins: Mapping[Pair, float]) -> list[list[float]]:
    """Return P with P[i][j] = ``wins[i, j]`` for i < j, P[j][i] = 1 - P[i][j] exactly, and one half elsewhere."""
    matrix = [[0.5] * count for _ in range(count)]
    for (i, j), value in wins.items():
        matrix[i][j], matrix[j][i] = value, 1.0 - value
    return matrix


def probabilities_of(count: int, margins: Mapping[Pair, float]) -> dict[Pair, float | None]:
    """Return P(i beats j) of all pairs i < j from ``margins[i, j]`` = logit(i, j) - logit(j, i); pairs that are left out have 0.

    s_i is the mean of i's margins over all items, including itself (0), and P(i beats j) = sigmoid(s_i - s_j): LLM-Blender's
    scores (arXiv 2306.02561) as SPPO's published code reads them (arXiv 2405.00675).
    """
    scores = [0.0] * count
    for item in range(count):
        signed = ((1 if item == i else -1) * margin for (i, j), margin in margins.items() if item in (i, j))
        scores[item] = math.fsum(signed) / count
    return {(i, j): sigmoid(scores[i] - scores[j]) for i, j in combinations(range(count), 2)}


def failed_items(count: int, unknown: Sequence[Pair]) -> set[int]:
    """Return items whose removal leaves no unknown pair, chosen greedily by the number of unknown pairs."""
    failed: set[int] = set()
    left = list(unknown)
    while left:
        missing = [sum(item in pair for pair in left) for item in range(count)]
        worst = max(range(count), key=lambda item: missing[item])
        failed.add(worst)
        left = [pair for pair in left if worst not in pair]
    if failed and count - len(failed) == 1:
        failed = set(range(count))  # a single remaining item has been compared with nothing
    return failed


def labels_of(count: int, wins: Mapping[Pair, float | None], with_reference: bool) -> GroupLabels:
    """Return the labels of a group from P(i beats j) of all pairs i < j; with ``with_reference``, the last item is the ground
    truth.

    A score is the mean win rate against all items that did not fail, including the item itself (one half): SPPO's estimate of
    P(y beats pi_t | x) (arXiv 2405.00675). A failed item has the score ``None`` and one half in the matrix.
    """
    failed = failed_items(count, [pair for pair, value in wins.items() if value is None])
    known = {pair: value for pair, value in wins.items() if value is not None and not failed & set(pair)}
    matrix = win_matrix(count, known)
    alive = [item for item in range(count) if item not in failed]
    scores = [
        None if item in failed else math.fsum(matrix[item][other] for other in alive) / len(alive)
        for item in range(count)
    ]
    own = count - with_reference
    return GroupLabels(
        scores[:own], [row[:own] for row in matrix[:own]], reference_score=scores[-1] if with_reference else None
    )
