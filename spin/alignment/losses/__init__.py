"""What a pair costs. One file and one line here for each loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from spin.alignment.errors import InputError, lookup
from spin.alignment.losses.base import Loss, LossInputs, LossOutputs
from spin.alignment.losses.hinge import hinge
from spin.alignment.losses.ipo import ipo
from spin.alignment.losses.sigmoid import sigmoid

LOSSES: dict[str, Loss] = {
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid": sigmoid,
}


def loss_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a loss takes; a setting it does not know may only be at its neutral value (0 or false).

    Raises:
        InputError: an unknown loss, or a setting that this loss would ignore.
    """
    known = inspect.signature(lookup(LOSSES, name, "loss_type")).parameters
    for key, value in settings.items():
        if key not in known and value:
            takers = ", ".join(other for other, loss in LOSSES.items() if key in inspect.signature(loss).parameters)
            raise InputError(f"{key} is {value}, but loss_type {name} does not use it: remove it or choose {takers}")
    return {key: value for key, value in settings.items() if key in known}


__all__ = ["LOSSES", "Loss", "LossInputs", "LossOutputs", "loss_settings"]
