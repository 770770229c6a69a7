"""Which pairs of an optimiser batch go into which micro-batch."""

from __future__ import annotations

from collections.abc import Sequence


def consecutive(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut indices into runs whose sizes add up to at most a limit; an index that exceeds it stands alone."""
    runs: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not runs or total + size > limit:
            runs.append([])
            total = 0
        runs[-1].append(index)
        total += size
    return runs


def plan_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute pairs over as few micro-batches as possible (first fit, longest first); none holds more tokens than the
    budget, unless a single pair does.
    """
    plan: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = next((number for number, free in enumerate(room) if free >= sizes[index]), None)
        if fitting is None:
            plan.append([index])
            room.append(budget - sizes[index])
        else:
            plan[fitting].append(index)
            room[fitting] -= sizes[index]
    return [sorted(indices) for indices in plan]


def plan_by_pairs(number: int, pairs: int) -> list[list[int]]:
    """Cut pairs into micro-batches of a fixed number of pairs, in their order."""
    return [list(range(start, min(start + pairs, number))) for start in range(0, number, pairs)]


def stretch_plan(plan: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return a plan of exactly ``count`` micro-batches: the fullest are halved; where single pairs are left, empty
    micro-batches are added. Processes that share collectives must take the same number of forwards.
    """
    stretched = [list(indices) for indices in plan]
    while len(stretched) < count:
        fullest = max(range(len(stretched)), key=lambda number: len(stretched[number]))
        indices = stretched[fullest]
        half = len(indices) // 2
        stretched[fullest : fullest + 1] = [indices[half:], indices[:half]]
    return stretched
