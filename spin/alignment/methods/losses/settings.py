"""The settings passed to a loss: shared ones, which are configuration keys, and those specific to the loss."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from typing import Any

from spin.alignment.core.config import convert
from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.methods.losses import LOSSES, Loss, find_loss


def shared_settings() -> set[str]:
    """Return the names of all settings of registered losses; those that are configuration keys are shared settings."""
    return {key for name in LOSSES for key in find_loss(name).settings}


def loss_arguments(name: str, shared: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the keyword arguments of a loss.

    Args:
        shared: settings that are configuration keys; one that this loss does not take must have the default value of a loss
            that does.
        own: settings specific to this loss (``loss_settings`` in the configuration).

    Raises:
        InputError: an unknown loss or setting, a setting that this loss would ignore, or a value of the wrong type or range.
    """
    loss = find_loss(name)
    known = loss.settings
    for key, value in shared.items():
        takers = {other: found for other in LOSSES if (found := find_loss(other).settings.get(key))}
        if key not in known and all(value != taker.default for taker in takers.values()):
            raise InputError(
                f"{key} is {value}, but loss_type {name} does not use it: remove it or choose {', '.join(takers)}"
            )
    return {key: value for key, value in shared.items() if key in known} | _own_arguments(name, loss, shared, own or {})


def _own_arguments(name: str, loss: Loss, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: item for key, item in loss.settings.items() if key not in shared}
    unset = [key for key, item in settings.items() if item.default is inspect.Parameter.empty and key not in own]
    if unset:
        raise InputError(
            f"loss_type {name} needs a value for {unset[0]}: set it under loss_settings, or give its parameter a default"
        )
    return {key: _checked(name, loss, key, value, shared) for key, value in own.items()}


def _checked(name: str, loss: Loss, key: str, value: Any, shared: Mapping[str, Any]) -> Any:
    own = [other for other in loss.settings if other not in shared]
    if key in shared:
        raise InputError(
            f"loss_settings contains '{key}', which is a key of its own: write {key}: {value} next to loss_type"
        )
    if key not in own:
        choice = f"it takes {', '.join(own)}{suggestion(key, own)}" if own else "it has no settings of its own"
        raise InputError(f"loss_settings contains '{key}', which loss_type {name} does not take: {choice}")
    found = convert(value, _hint(loss, key), f"'{key}' in loss_settings")
    least = loss.least.get(key, -math.inf)
    if isinstance(found, float) and not least <= found < math.inf:
        wanted = "a finite number" if least == -math.inf else f"{least:g} or more"
        raise InputError(f"'{key}' in loss_settings is {found}: set it to {wanted}")
    return found


def _hint(loss: Loss, key: str) -> Any:
    """Return the type of a setting: its annotation, else the type of its default (float for any number)."""
    try:
        hint = typing.get_type_hints(loss.function).get(key)
    except Exception:  # annotations that only a type checker can resolve
        hint = None
    default = loss.settings[key].default
    if hint is not None or default is None or default is inspect.Parameter.empty:
        return Any if hint is None else hint
    return float if isinstance(default, int) and not isinstance(default, bool) else type(default)


__all__ = ["loss_arguments", "shared_settings"]
