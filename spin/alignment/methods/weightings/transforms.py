"""From gains to weights, one response at a time. Each transform is a pure function of a list of numbers.

The numbers are ``u_t = +d_t`` for a chosen and ``-d_t`` for a rejected response (nats): the larger, the more a token is to be
learned from. ``exponential`` is TIS-DPO's own (arXiv 2410.04350, eq. 11); the others are the variants of its public
implementation. ``origin`` and ``threshold`` may give weights below 0, as they do there: such a token is pushed the other way.
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

    The paper clamps ``d`` and then turns the sign, ``k exp(-mu clamp(d, L, U))`` for the rejected response. In terms of
    ``u = -d`` that is this function with the bounds ``-U`` and ``-L``; :func:`side_settings` swaps them.
    """
    _check(k > 0, f"k is {k}: set it above 0")
    _check_range("lower", lower, "upper", upper)
    return [k * math.exp(mu * min(max(value, lower), upper)) for value in values]


def origin(values: Sequence[float]) -> list[float]:
    """Return the numbers as they are."""
    return [float(value) for value in values]


def binary(values: Sequence[float], p: float = 50.0) -> list[float]:
    """Return 1 for the top ``p`` percent of a response's tokens and 0 for the rest.

    ``ceil(p n / 100)`` of n tokens are taken, and every token that equals the last of them.
    """
    _check(0 <= p <= 100, f"p is {p}: set it from 0 to 100 (percent)")
    count = math.ceil(p * len(values) / 100)
    if count == 0:
        return [0.0] * len(values)
    least = sorted(values, reverse=True)[count - 1]
    return [1.0 if value >= least else 0.0 for value in values]


def threshold(values: Sequence[float], lower: float = -1.0, upper: float = 1.0) -> list[float]:
    """Return the numbers, clipped to ``[lower, upper]``."""
    _check_range("lower", lower, "upper", upper)
    return [min(max(float(value), lower), upper) for value in values]


def threshold_and_scale(
    values: Sequence[float], lower: float = -1.5, upper: float = 1.5, low: float = 0.7, high: float = 1.3
) -> list[float]:
    """Return the numbers clipped to ``[lower, upper]``, which is mapped linearly to ``[low, high]``."""
    _check_range("low", low, "high", high)
    slope = (high - low) / (upper - lower) if upper > lower else 0.0
    return [low + slope * (value - lower) for value in threshold(values, lower, upper)]


def rank_based(values: Sequence[float], low: float = 0.7, high: float = 1.3) -> list[float]:
    """Return the rank within the response mapped linearly: the smallest number gives ``low``, the largest ``high``.

    Equal numbers share the mean of their ranks; a response of one token, or of equal ones, is in the middle.
    """
    _check_range("low", low, "high", high)
    order = sorted(range(len(values)), key=lambda index: values[index])
    weights = [0.0] * len(values)
    start = 0
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
    """Return uniform random numbers from ``[low, high]``, whatever the values: an ablation.

    One seed gives one sequence, so a caller gives each response a seed of its own.
    """
    _check_range("low", low, "high", high)
    draw = random_numbers.Random(seed)
    return [draw.uniform(low, high) for _ in values]


def _check(valid: bool, sentence: str) -> None:
    if not valid:
        raise InputError(f"transform_params: {sentence}")


def _check_range(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    _check(lower < upper, f"{lower_name} is {lower} and {upper_name} {upper}: {lower_name} must be the smaller")
