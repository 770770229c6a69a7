"""Win rates: how often the responses of one model are better than those of another to the same prompts.

The value of a prompt is the probability that the first model's response is better: from a scorer that compares pairs, in both
orders; from any other, 1, 1/2 or 0 by the higher score. A tie therefore counts half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spin.alignment.evaluation.statistics import Z95, Estimate, mcnemar, mean

_STEPS, _TOLERANCE = 100, 1e-10  # of Newton's method, which needs about six


@dataclass(frozen=True)
class WinRate:
    """A win rate over ``prompts``, its standard errors and intervals being over prompts.

    Attributes:
        rate: the mean value of the prompts.
        controlled: the same at equal lengths; see :func:`length_controlled`.
        ties: the share of prompts with the value 1/2.
        wins, losses: the numbers of prompts above and below 1/2.
        p_value: two-sided, of the exact sign test on wins and losses.
    """

    rate: Estimate
    controlled: Estimate
    ties: Estimate
    wins: int
    losses: int
    p_value: float
    prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether wins and losses differ beyond chance at the 5 % level."""
        return self.p_value < 0.05

    def as_row(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        rates = (("win_rate", self.rate), ("lc_win_rate", self.controlled), ("tie_rate", self.ties))
        row: dict[str, Any] = {key: value for name, found in rates for key, value in found.as_row(name).items()}
        counts = {"wins": self.wins, "losses": self.losses, "p_value": self.p_value, "prompts": self.prompts}
        return row | counts


def win_rate(values: Sequence[float], excess: Sequence[float]) -> WinRate:
    """Return the win rate of a model.

    Args:
        values: for each prompt, the probability that the model's response is better.
        excess: for each prompt, how many characters longer its response is.

    Raises:
        ValueError: there are no prompts.
    """
    if not values:
        raise ValueError("a win rate needs at least one prompt")
    wins, losses = sum(value > 0.5 for value in values), sum(value < 0.5 for value in values)
    return WinRate(
        rate=mean(values),
        controlled=length_controlled(values, excess),
        ties=mean([float(value == 0.5) for value in values]),
        wins=wins,
        losses=losses,
        p_value=mcnemar(wins, losses),
        prompts=len(values),
    )


def length_controlled(values: Sequence[float], excess: Sequence[float]) -> Estimate:
    r"""Return the win rate that the model would have if its responses were as long as those of the other.

    The logistic regression of AlpacaEval 2 (Y. Dubois et al., arXiv 2404.04475) for one pair of models. With the value y_i of a
    prompt and the difference in length d_i, in characters,

        logit P(win_i) = theta + phi * tanh(d_i / s),      s the standard deviation of the d_i

    is fitted by maximum likelihood (cross-entropy, so that y_i may be a probability), and sigmoid(theta) is returned: the
    prediction at d = 0. AlpacaEval's third term, the difficulty of an instruction, is estimated from many models and left out.
    Without a prior, a model that always wins would have an infinite theta. Here it is one tie at d = 0 (half a win, half a
    loss), and a standard normal one on phi. Exchanging the models gives 1 minus the result.

    The standard error of theta is the larger one of the sandwich estimator (H. White, Econometrica 50, 1982), which allows for
    values that are no coin flips, and that of the inverse information, as the first vanishes where the fit is perfect. The
    interval is transformed, so it stays between 0 and 1.
    """
    y, d = np.asarray(values, dtype=np.float64), np.asarray(excess, dtype=np.float64)
    spread = float(d.std())
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    design = np.stack([np.ones_like(x), x], axis=1)  # (N, 2)
    beta, information = np.zeros(2), np.eye(2)
    for _ in range(_STEPS):
        p = _sigmoid(design @ beta)
        prior = float(_sigmoid(beta[:1])[0])
        gradient = design.T @ (y - p) + np.array([0.5 - prior, -beta[1]])
        information = (design.T * (p * (1 - p))) @ design + np.diag([prior * (1 - prior), 1.0])
        step = np.linalg.solve(information, gradient)
        beta += step / max(1.0, float(np.abs(step).max()))  # no step above 1: from far away, Newton's overshoots
        if float(np.abs(step).max()) < _TOLERANCE:
            break
    value = float(_sigmoid(beta[:1])[0])
    if len(y) < 2:
        return Estimate(value, None, None)
    inverse = np.linalg.inv(information)
    scores = design * (y - _sigmoid(design @ beta))[:, None]  # (N, 2)
    error = math.sqrt(max(float((inverse @ (scores.T @ scores) @ inverse)[0, 0]), float(inverse[0, 0])))
    low, high = _sigmoid(beta[0] + Z95 * error * np.array([-1.0, 1.0]))
    return Estimate(value, error * value * (1 - value), (float(low), float(high)))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -500, 500))))
