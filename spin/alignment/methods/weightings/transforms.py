"""Transforms map the gains of one response to weights. Each is a pure function of a list of numbers.

The numbers are ``u_t = +d_t`` for a chosen and ``-d_t`` for a rejected response (nats): the larger, the more should be learned
from a token. ``exponential`` is TIS-DPO's own (arXiv 2410.04350, eq. 11); the others are the variants in its public
implementation. As there, ``origin`` and ``threshold`` can return negative weights, which reverse the gradient of a token.
"""

from __future__ import annotations

import math
import random as random_numbers
from collections.abc import Sequence

from spin.alignment.core.errors import InputError


def exponential(
    values: Sequence[float], k: float = 1.0, mu: float = 1.0, lower: float = -0.5, upper: float = 1.5
) -> list[float]:
    """Return ``k exp(mu clamp(u, lower, upper))`` (TIS-DPO, eq. 11).

    For the rejected response the paper clamps ``d`` and then negates it: ``k exp(-mu clamp(d, L, U))``. In terms of ``u = -d``
    that is this function with the bounds ``-U`` and ``-L``, which :func:`side_settings` sets.
    """
    _check(k > 0, f"k is {k}: set it above 0")
    _check_range("lower", lower, "upper", upper)
    return [k * math.exp(mu * min(max(value, lower), upper)) for value in values]


def origin(values: Sequence[float]) -> list[float]:
    """Return the numbers unchanged."""
    return [float(value) for value in values]


def binary(values: Sequence[float], top_percent: float = 50.0) -> list[float]:
    """Return 1 for the top ``top_percent`` of a response's tokens and 0 for the rest.

    As in TIS-DPO's implementation, the largest ``int(n top_percent / 100)`` of n tokens are selected, but none of several equal
    ones of which only some belong to them: equal tokens get equal weights.
    """
    _check(0 <= top_percent <= 100, f"top_percent is {top_percent}: set it from 0 to 100")
    ordered = sorted(values, reverse=True)
    count = int(len(ordered) * top_percent / 100)
    if count == len(ordered):
        return [1.0] * len(ordered)
    largest_excluded = ordered[count]
    return [1.0 if value > largest_excluded else 0.0 for value in values]


def threshold(values: Sequence[float], lower: float = -1.0, upper: float = 1.0) -> list[float]:
    """Return the numbers, clipped to ``[lower, upper]``."""
    _check_range("lower", lower, "upper", upper)
    return [min(max(float(value), lower), upper) for value in values]


def threshold_and_scale(
    values: Sequence[float], lower: float = -1.5, upper: float = 1.5, low: float = 0.7, high: float = 1.3
) -> list[float]:
    """Return the numbers clipped to ``[lower, upper]`` and mapped linearly to ``[low, high]``."""
    _check_range("low", low, "high", high)
    slope = (high - low) / (upper - lower) if upper > lower else 0.0
    return [low + slope * (value - lower) for value in threshold(values, lower, upper)]


def rank_based(values: Sequence[float], low: float = 0.7, high: float = 1.3) -> list[float]:
    """Return the ranks within the response, mapped linearly: ``low`` for the smallest number, ``high`` for the largest.

    Equal numbers get the mean of their ranks; a single token, or tokens with equal numbers, get the midpoint.
    """
    _check_range("low", low, "high", high)
    order = sorted(range(len(values)), key=lambda index: values[index])
    weights = [0.0] * len(values)
    start = 0  # of a run of equal numbers in sorted order
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        share = (start + end - 1) / 2 / (len(order) - 1) if len(order) > 1 else 0.5
        for index in order[start:end]:
            weights[index] = low + (high - low) * share
        start = end
    return weights


def random(values: Sequence[float], low: float = 0.7, high: float = 1.3, seed: int = 0) -> list[float]:
    """Return uniform random numbers from ``[low, high]`` regardless of the values, as an ablation.

    A seed always gives the same sequence, so each response needs a seed of its own.
    """
    _check_range("low", low, "high", high)
    draw = random_numbers.Random(seed)
    return [draw.uniform(low, high) for _ in values]


def _check(valid: bool, sentence: str) -> None:
    if not valid:
        raise InputError(f"transform_params: {sentence}")


def _check_range(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    _check(lower < upper, f"{lower_name} is {lower} and {upper_name} is {upper}: set {lower_name} below {upper_name}")
