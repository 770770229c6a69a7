"""What a contender of a training benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns


@dataclass(frozen=True)
class Contender:
    """``run(job, turns)`` prepares and trains; ``grouped``: batches grouped by length; ``cached``: reference computed once."""

    label: str
    run: Callable[[Job, Turns], None]
    grouped: bool = False
    cached: bool = True
