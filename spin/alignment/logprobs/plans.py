"""Assigns the pairs of an optimiser step to micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def consecutive(sizes: Sequence[int], limit: int) -> list[range]:
    """Divide indices into runs whose sizes sum to at most ``limit``; an index larger than that gets a run of its own."""
    starts: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if not starts or total + size > limit:
            starts.append(index)
            total = 0
        total += size
    return [range(start, end) for start, end in pairwise([*starts, len(sizes)])]


def plan_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute pairs over few micro-batches (first fit, longest first); none exceeds the budget of tokens, except for a
    single pair that is itself larger.
    """
    plan: list[list[int]] = []
    remaining: list[int] = []
    # First-fit decreasing: at most 11/9 of the optimal number of micro-batches, plus one.
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = next((number for number, free in enumerate(remaining) if free >= sizes[index]), None)
        if fitting is None:
            plan.append([index])
            remaining.append(budget - sizes[index])
        else:
            plan[fitting].append(index)
            remaining[fitting] -= sizes[index]
    return [sorted(indices) for indices in plan]


def plan_by_pairs(number: int, pairs: int) -> list[list[int]]:
    """Divide pairs into micro-batches of a fixed number of pairs, in order."""
    return [list(range(start, min(start + pairs, number))) for start in range(0, number, pairs)]


def stretch_plan(plan: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return a plan of exactly ``count`` micro-batches: the fullest are halved, and once only single pairs remain, empty
    micro-batches are added. Processes that take part in collectives must run the same number of forward passes.
    """
    stretched = [list(indices) for indices in plan]
    while len(stretched) < count:
        fullest = max(range(len(stretched)), key=lambda number: len(stretched[number]))
        indices = stretched[fullest]
        half = len(indices) // 2
        stretched[fullest : fullest + 1] = [indices[half:], indices[:half]]
    return stretched
