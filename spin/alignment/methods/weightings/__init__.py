"""Token weightings: one file per weighting and one line per weighting here; all transforms are in one file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

from spin.alignment.core.errors import InputError, lookup, suggestion
from spin.alignment.core.resolve import resolve
from spin.alignment.core.sides import SIDES
from spin.alignment.methods.weightings.base import Compares, PairTokens, Transform, Weighting
from spin.alignment.methods.weightings.drift import drift
from spin.alignment.methods.weightings.reverse_dpo import reverse_dpo
from spin.alignment.methods.weightings.stored_gains import stored_gains
from spin.alignment.methods.weightings.teacher import teacher
from spin.alignment.methods.weightings.transforms import (
    binary,
    exponential,
    origin,
    random,
    rank_based,
    threshold,
    threshold_and_scale,
)
from spin.alignment.methods.weightings.uniform import uniform

WEIGHTINGS: dict[str, Weighting] = {
    "drift": Weighting(drift),
    "reverse_dpo": Weighting(reverse_dpo, Compares.TRAINED),
    "stored_gains": Weighting(stored_gains, Compares.STORED),
    "teacher": Weighting(teacher, Compares.TEACHER),
    "uniform": Weighting(uniform, constant=True),
}
WEIGHT_TRANSFORMS: dict[str, Transform] = {
    "binary": binary,
    "exponential": exponential,
    "origin": origin,
    "random": random,
    "rank_based": rank_based,
    "threshold": threshold,
    "threshold_and_scale": threshold_and_scale,
}
DEFAULT_TRANSFORM = "exponential"
# Settings under earlier names, and under those of TIS-DPO's implementation.
RENAMED_SETTINGS: dict[str, dict[str, str]] = {
    "binary": {"p": "top_percent"},
    "random": {"min_val": "low", "max_val": "high"},
    "rank_based": {"min_scale": "low", "max_scale": "high"},
    "threshold": {"lower_threshold": "lower", "upper_threshold": "upper"},
    "threshold_and_scale": {"min_val": "lower", "max_val": "upper", "min_scale": "low", "max_scale": "high"},
}


def find_weighting(name: str) -> Weighting:
    """Return a weighting by its configured name: one in :data:`WEIGHTINGS`, or ``module:function`` of a user's own file.

    Raises:
        InputError: the weighting does not exist, or does not take the tokens of a pair.
    """
    found = resolve(WEIGHTINGS, name, "weighting", takes=("pair",))
    return found if isinstance(found, Weighting) else Weighting(found)


def draws(transform: str) -> bool:
    """Return whether a transform draws random numbers, which is the case if it has a ``seed`` parameter."""
    return "seed" in inspect.signature(WEIGHT_TRANSFORMS[transform]).parameters


def check_transform(name: str, settings: Mapping[str, object]) -> dict[str, float]:
    """Return the settings of a transform as numbers, under their present names (see :data:`RENAMED_SETTINGS`).

    Raises:
        InputError: an unknown transform or setting, a setting given under both of its names, a value that is not a finite number,
            or one out of range.
    """
    known = list(inspect.signature(lookup(WEIGHT_TRANSFORMS, name, "transform")).parameters)[1:]
    numbers: dict[str, float] = {}
    for given, value in settings.items():
        key = RENAMED_SETTINGS.get(name, {}).get(given, given)
        if key != given and key in settings:
            raise InputError(
                f"transform_params contains '{given}' and '{key}', which are the same setting: keep '{key}'"
            )
        if key not in known:
            choice = f"it takes {', '.join(known)}{suggestion(key, known)}" if known else "it takes no settings"
            raise InputError(f"transform_params contains '{key}', which transform {name} does not take: {choice}")
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (key == "seed" and number != int(number)):
            kind = "a whole number" if key == "seed" else "a number"
            raise InputError(f"{key} in transform_params is '{value}': set it to {kind}")
        numbers[key] = int(number) if key == "seed" else number
    WEIGHT_TRANSFORMS[name]([0.0], **numbers)  # checks the ranges
    return numbers


def side_settings(name: str, settings: Mapping[str, float], side: str) -> dict[str, float]:
    """Return a transform's settings for a side. TIS-DPO clamps before negating, so the bounds are mirrored for rejected."""
    if name != "exponential" or side == "chosen":
        return dict(settings)
    defaults = {key: item.default for key, item in inspect.signature(exponential).parameters.items()}
    both = {**{key: defaults[key] for key in ("lower", "upper")}, **settings}
    return {**settings, "lower": -both["upper"], "upper": -both["lower"]}


def weights_of_pair(
    weighting: str,
    pair: PairTokens,
    transform: str = DEFAULT_TRANSFORM,
    settings: Mapping[str, float] | None = None,
    seeds: tuple[int, int] = (0, 1),
) -> tuple[list[float], list[float]]:
    """Return the weights of both responses, one per token; NaN for a token without a gain (it was not scored).

    ``seeds`` are those of the chosen and the rejected response, for a transform that draws random numbers.
    """
    method = find_weighting(weighting)
    numbers = method(pair)
    if not method.gives_gains:
        return numbers
    found = []
    for side, values, ids, seed in zip(SIDES, numbers, (pair.chosen_ids, pair.rejected_ids), seeds, strict=True):
        drawn = {"seed": seed} if draws(transform) else {}
        given = {**side_settings(transform, settings or {}, side), **drawn}
        found.append(_padded(WEIGHT_TRANSFORMS[transform](values, **given), ids))
    return found[0], found[1]


def _padded(weights: list[float], ids: Sequence[int]) -> list[float]:
    if len(weights) > len(ids):
        raise ValueError(f"{len(weights)} gains for a response of {len(ids)} tokens")
    return weights + [math.nan] * (len(ids) - len(weights))


__all__ = [
    "DEFAULT_TRANSFORM",
    "WEIGHTINGS",
    "WEIGHT_TRANSFORMS",
    "Compares",
    "PairTokens",
    "Transform",
    "Weighting",
    "check_transform",
    "draws",
    "find_weighting",
    "side_settings",
    "weights_of_pair",
]
