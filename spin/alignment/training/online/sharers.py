"""Training processes of one machine that share an engine over their GPUs: their prompts go to the first, its responses back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from spin.alignment.core.errors import InputError


def check_can_share(size: int) -> None:
    """Check that the processes of this machine, as they were launched, can be divided into groups of ``size``.

    Raises:
        InputError: they cannot.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes % size:
        raise InputError(
            f"tensor_parallel_size is {size}, but the number of training processes on this machine, {processes}, is not a "
            "multiple of it: set it to a divisor"
        )


class Sharers:
    """A group of neighbouring processes, of which the first has the engine."""

    def __init__(self, ranks: Sequence[int], group: Any) -> None:
        """``ranks`` are the processes of this ``group`` of torch.distributed, one of them this process."""
        self._ranks, self._group = list(ranks), group
        self._counts: list[int] = []  # requests of each process in the last gather, known to the first

    @classmethod
    def of(cls, size: int) -> Sharers | None:
        """Return this process's group if ``size`` processes share an engine; None if each has its own. Every process must call
        it.

        Raises:
            InputError: the processes of this machine cannot be divided like that.
        """
        check_can_share(size)
        if size == 1:
            return None
        own = None
        for first in range(0, dist.get_world_size(), size):
            ranks = range(first, first + size)
            group = dist.new_group(list(ranks), backend="gloo")  # every process must make every group
            if dist.get_rank() in ranks:
                own = cls(ranks, group)
        return own

    @property
    def leads(self) -> bool:
        """Whether this process has the engine."""
        return dist.get_rank() == self._ranks[0]

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of all processes in the first, nothing in the others."""
        found: list[Any] | None = [None] * len(self._ranks) if self.leads else None
        dist.gather_object(list(items), found, dst=self._ranks[0], group=self._group)
        self._counts = [len(some) for some in found or []]
        return [item for some in found or [] for item in some]

    def scatter(self, answers: Sequence[Any]) -> list[Any]:
        """Return this process's share of the first one's ``answers``, one for each item that it last gathered."""
        rest, shares = list(answers), []
        for count in self._counts:
            shares.append(rest[:count])
            rest = rest[count:]
        own: list[Any] = [None]
        dist.scatter_object_list(own, shares or None, src=self._ranks[0], group=self._group)
        return list(own[0])
