"""Errors, intervals and paired comparisons of held-out numbers. Pure functions of one value per prompt.

The prompts are the sample: intervals say how far a number may move with other prompts from the same source, not with another seed
of training. Two models answer the same prompts, so they are compared prompt by prompt: what makes a prompt hard is common to both
and cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and its 95 % interval; from a single prompt, error and interval are None."""

    value: float
    error: float | None
    interval: tuple[float, float] | None

    def as_row(self, key: str) -> dict[str, float | list[float]]:
        """Return ``key``, ``key_se`` and ``key_interval`` (low, high) as JSON values; those that are None are left out."""
        row: dict[str, float | list[float]] = {key: self.value}
        if self.error is not None and self.interval is not None:
            row |= {f"{key}_se": self.error, f"{key}_interval": list(self.interval)}
        return row


@dataclass(frozen=True)
class Comparison:
    """A paired difference (one minus the other) over ``prompts``, its standard error and two-sided p-value."""

    difference: float
    error: float
    p_value: float
    prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the difference is beyond chance at the 5 % level."""
        return self.p_value < 0.05

    def as_row(self) -> dict[str, float | int]:
        """Return the numbers as JSON values: ``difference``, ``se``, ``p_value``, ``prompts``."""
        return {"difference": self.difference, "se": self.error, "p_value": self.p_value, "prompts": self.prompts}


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per prompt: the error is s / sqrt(n), the interval normal.

    The interval of a proportion (all values 0 or 1) is Wilson's, which is also right near 0 and 1.
    """
    data = np.asarray(values, dtype=np.float64)
    value, count = float(data.mean()), len(data)
    if count < 2:
        return Estimate(value, None, None)
    error = float(data.std(ddof=1)) / math.sqrt(count)
    if bool(np.isin(data, (0.0, 1.0)).all()):
        return Estimate(value, error, wilson(float(data.sum()), count))
    return Estimate(value, error, (value - Z95 * error, value + Z95 * error))


def proportion(successes: float, count: int) -> Estimate:
    """Return :func:`mean` of ``successes`` ones and ``count - successes`` zeros."""
    value = successes / count
    if count < 2:
        return Estimate(value, None, None)
    return Estimate(value, math.sqrt(value * (1 - value) / (count - 1)), wilson(successes, count))


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion (E. B. Wilson, JASA 22, 1927, equation 3 onwards)."""
    share, square = successes / count, Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # Without rounding errors at the ends, where the interval contains 0 or 1 exactly.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def ratio(sums: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """Return sum(y) / sum(x) of per-prompt sums y and sizes x, such as nats and tokens.

    The error is the delta method's for the ratio estimator (W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6):
    the standard error of the mean of the residuals y - R x, divided by the mean of x. The spread of the sizes themselves does not
    count, because a long prompt has more nats and more tokens.
    """
    residuals, value = _residuals(sums, sizes)
    if len(residuals) < 2:
        return Estimate(value, None, None)
    error = _error_of_mean(residuals)
    return Estimate(value, error, (value - Z95 * error, value + Z95 * error))


def compare_ratios(
    one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]]
) -> Comparison:
    """Compare two ratios, each given as (sums, sizes) over the same prompts in the same order.

    Each ratio is linearised as in :func:`ratio`; the error of the difference is that of the mean of the differences of the two
    residuals of each prompt (Cochran, chapter 6: comparing two ratios from the same sample). The sizes may differ: the models may
    have different tokenizers.
    """
    mine, value = _residuals(*one)
    theirs, base = _residuals(*other)
    error = _error_of_mean(mine - theirs)
    difference = value - base
    return Comparison(difference, error, _normal_p(difference, error), len(mine))


def compare_means(one: Sequence[float], other: Sequence[float]) -> Comparison:
    """Compare the means of two scores over the same prompts in the same order.

    Scores that are all 0 or 1 are compared by McNemar's exact test (:func:`mcnemar`), others by a paired z-test.
    """
    mine, theirs = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    differences = mine - theirs
    difference, error = float(differences.mean()), _error_of_mean(differences)
    if bool(np.isin(mine, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all()):
        p_value = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p_value = _normal_p(difference, error)
    return Comparison(difference, error, p_value, len(differences))


def bootstrap_difference(
    ones: Sequence[Sequence[tuple[float, float]]],
    others: Sequence[Sequence[tuple[float, float]]],
    samples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return the mean over training seeds of the paired difference of two models, with its error over seeds and prompts.

    Both are resampled with replacement, prompts together in all seeds (B. Efron and R. Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 8). The interval is that of the percentiles.

    Args:
        ones, others: for each seed (total, count) of every prompt, in the same order; a model's average is the sum of the totals
            divided by that of the counts.
    """
    mine, theirs = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)  # (S, N, 2)
    seeds, prompts = mine.shape[:2]
    random, drawn = np.random.default_rng(seed), np.empty(samples)
    for index in range(samples):
        rows = random.integers(seeds, size=seeds)
        # How often each prompt was drawn: sums over drawn prompts are products with these counts.
        weights = np.bincount(random.integers(prompts, size=prompts), minlength=prompts)
        ours, base = weights @ mine[rows], weights @ theirs[rows]  # (S, 2)
        drawn[index] = (ours[:, 0] / ours[:, 1] - base[:, 0] / base[:, 1]).mean()
    value = (mine[..., 0].sum(1) / mine[..., 1].sum(1) - theirs[..., 0].sum(1) / theirs[..., 1].sum(1)).mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(value), float(drawn.std(ddof=1)), (float(low), float(high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for the number of comparisons (S. Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: without a difference, the number of wins among the prompts on which
    the two models disagree is binomial with probability 1/2 (Q. McNemar, Psychometrika 12, 1947).
    """
    count, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)  # integers of any size: exact for every count


def _residuals(sums: Sequence[float], sizes: Sequence[float]) -> tuple[np.ndarray, float]:
    """Return (y - R x) / mean(x) for each prompt, and R."""
    y, x = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    value = float(y.sum() / x.sum())
    return (y - value * x) / x.mean(), value


def _error_of_mean(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _normal_p(difference: float, error: float) -> float:
    """Return the two-sided p-value of a z-test; without any spread, only a difference of exactly 0 is no difference."""
    if error == 0.0:
        return float(difference == 0.0)
    return math.erfc(abs(difference) / error / math.sqrt(2))
