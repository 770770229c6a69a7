"""Labels of single responses: one number for the chosen and one for the rejected response of a pair.

Label ``x`` is the columns ``chosen_x`` and ``rejected_x`` of the pairs. A pairing that writes them names it, a loss that names it
gets it as ``LossInputs.labels["x"]``; nothing between them has to know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from spin.alignment.core.sides import SIDES


@dataclass(frozen=True)
class Label:
    """A label and what its values must be: finite, and a probability (0 to 1) where it is one."""

    name: str
    is_probability: bool = False

    @property
    def wanted(self) -> str:
        return "a probability" if self.is_probability else "a finite number"

    def allows(self, value: float | None) -> bool:
        """Return whether a value may be trained on."""
        return value is not None and math.isfinite(value) and (not self.is_probability or 0 <= value <= 1)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{side}_{self.name}" for side in SIDES)


SCORE = Label("score")
REWARD = Label("reward")
WIN_PROB = Label("win_prob", is_probability=True)
PAIR_WIN_PROB = Label("pair_win_prob", is_probability=True)


def as_labels(names: Iterable[Label | str]) -> tuple[Label, ...]:
    """Return labels; a plain name stands for any finite number."""
    return tuple(Label(item) if isinstance(item, str) else item for item in names)
