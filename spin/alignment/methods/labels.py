"""Labels of individual responses: one number for the chosen and one for the rejected response of a pair.

Label ``x`` is stored in the columns ``chosen_x`` and ``rejected_x`` of the pairs. A pairing that writes it and a loss that reads
it both declare it; the loss receives it as ``LossInputs.labels["x"]``. No code in between needs to know the label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from spin.alignment.core.sides import SIDES


@dataclass(frozen=True)
class Label:
    """A label and the constraint on its values: finite, and from 0 to 1 if it is a probability."""

    name: str
    is_probability: bool = False

    @property
    def wanted(self) -> str:
        return "a probability" if self.is_probability else "a finite number"

    def allows(self, value: float | None) -> bool:
        """Return whether a value is valid for training."""
        return value is not None and math.isfinite(value) and (not self.is_probability or 0 <= value <= 1)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"{side}_{self.name}" for side in SIDES)


SCORE = Label("score")
REWARD = Label("reward")
WIN_PROB = Label("win_prob", is_probability=True)
PAIR_WIN_PROB = Label("pair_win_prob", is_probability=True)


def as_labels(names: Iterable[Label | str]) -> tuple[Label, ...]:
    """Return labels; a plain name becomes a label that allows any finite number."""
    return tuple(Label(item) if isinstance(item, str) else item for item in names)
