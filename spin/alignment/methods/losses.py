"""What a pair costs. One file and one line here for each loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.methods.losses.base import Loss, LossInputs, LossOutputs
from spin.alignment.methods.losses.hinge import hinge
from spin.alignment.methods.losses.ipo import ipo
from spin.alignment.methods.losses.sigmoid import sigmoid
from spin.alignment.methods.losses.space import space
from spin.alignment.methods.losses.sppo import soft_mean, sppo, sppo_hard, sppo_reward, sppo_single

LOSSES: dict[str, Loss] = {
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid": sigmoid,
    "space": space,
    "sppo": sppo,
    "sppo_hard": sppo_hard,
    "sppo_reward": sppo_reward,
    "sppo_single": sppo_single,
}


# Loss -> the label of both responses that it needs: columns ``chosen_{label}`` and ``rejected_{label}`` of the pairs.
LOSS_COLUMNS: dict[str, str] = {
    "sppo": "win_prob",
    "sppo_single": "pair_win_prob",
    "sppo_reward": "reward",
}


def loss_feature(column: str) -> str:
    """Return the name under which a label of :data:`LOSS_COLUMNS` reaches the loss: ``win_prob`` or ``reward``."""
    return column.removeprefix("pair_")


def loss_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a loss takes; a setting it does not know may only be at the default of those that know it.

    Raises:
        InputError: an unknown loss, or a setting that this loss would ignore.
    """
    known = inspect.signature(lookup(LOSSES, name, "loss_type")).parameters
    for key, value in settings.items():
        takers = {
            other: found for other, loss in LOSSES.items() if (found := inspect.signature(loss).parameters.get(key))
        }
        if key not in known and all(value != taker.default for taker in takers.values()):
            raise InputError(
                f"{key} is {value}, but loss_type {name} does not use it: remove it or choose {', '.join(takers)}"
            )
    return {key: value for key, value in settings.items() if key in known}


__all__ = ["LOSSES", "LOSS_COLUMNS", "Loss", "LossInputs", "LossOutputs", "loss_feature", "loss_settings", "soft_mean"]
