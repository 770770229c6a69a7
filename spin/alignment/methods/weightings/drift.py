"""DRIFT (2026): what chosen and rejected have in common is masked; only the tokens in which they differ are learned from."""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.methods.weightings.base import PairTokens


def drift(pair: PairTokens) -> tuple[list[float], list[float]]:
    """Return 0.0 for the tokens of a longest common subsequence of both responses and 1.0 for all others.

    The end-of-turn token is a token like any other: where both responses end with it, it is masked.
    """
    chosen, rejected = [1.0] * len(pair.chosen_ids), [1.0] * len(pair.rejected_ids)
    for left, right in common_subsequence(pair.chosen_ids, pair.rejected_ids):
        chosen[left] = rejected[right] = 0.0
    return chosen, rejected


def common_subsequence(left: Sequence[int], right: Sequence[int]) -> list[tuple[int, int]]:
    """Return the index pairs of a longest common subsequence, ascending; of several, always the same one.

    Rows of the usual table ``L[i][j]`` are kept as the bits of one integer, 0 where ``L`` grows by 1 from ``j`` to ``j + 1``,
    and a row follows from the one above by an addition (Hyyro 2004): ``O(n m / 64)`` instead of ``O(n m)`` steps.
    """
    places: dict[int, int] = {}
    for index, token in enumerate(right):
        places[token] = places.get(token, 0) | 1 << index
    everywhere = (1 << len(right)) - 1
    rows = [everywhere]
    for token in left:
        row = rows[-1]
        matches = row & places.get(token, 0)
        rows.append(((row + matches) | (row - matches)) & everywhere)
    found = []
    i, j = len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            i, j = i - 1, j - 1
            found.append((i, j))
        elif rows[i] >> (j - 1) & 1:
            j -= 1  # the last token on the right adds nothing
        else:
            i -= 1  # it does, so the last one on the left does not
    return found[::-1]
