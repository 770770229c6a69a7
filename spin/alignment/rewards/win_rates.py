"""Win probabilities and scores from judgements of pairs. Plain arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
