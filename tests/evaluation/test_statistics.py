"""Errors and comparisons of held-out numbers: by hand, against scipy-free arithmetic, and by simulation (coverage)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spin.alignment.evaluation.statistics import (
    Z95,
    bootstrap_difference,
    compare_means,
    compare_ratios,
    holm,
    mcnemar,
    mean,
    proportion,
    ratio,
    wilson,
)


def test_mean_by_hand():
    # values 0, 2: mean 1, variance 2 with n - 1, error sqrt(2 / 2) = 1
    found = mean([0.0, 2.0])
    assert (found.value, found.error) == (1.0, 1.0)
    assert found.interval == pytest.approx((1 - Z95, 1 + Z95))


def test_one_prompt_has_no_error():
    assert mean([3.0]).error is None and mean([3.0]).as_row("x") == {"x": 3.0}
    assert ratio([3.0], [2.0]).interval is None and proportion(1, 1).error is None


def test_a_proportion_has_wilsons_interval():
    # published example: 10 of 10 has the lower end n / (n + z^2) = 0.7225
    assert mean([1.0] * 10).interval == pytest.approx((10 / (10 + Z95**2), 1.0))
    assert wilson(0, 10) == pytest.approx((0.0, Z95**2 / (10 + Z95**2)))
    some = proportion(3, 8)
    values = mean([1.0] * 3 + [0.0] * 5)
    assert some.error == pytest.approx(values.error) and some.interval == pytest.approx(values.interval)


def test_ratio_by_hand():
    # y = 1, 5 and x = 1, 3: R = 6 / 4 = 1.5, residuals -0.5 and 0.5, their error 0.5, divided by the mean of x: 0.25
    found = ratio([1.0, 5.0], [1.0, 3.0])
    assert (found.value, found.error) == (1.5, pytest.approx(0.25))
    # Lengths alone have no error: every token costs the same.
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]).error == pytest.approx(0.0, abs=1e-15)


def test_paired_ratios_by_hand():
    # As above against y = 1, 4 (R = 1.25, residuals -0.25 and 0.25): the difference has half the error of one of them.
    found = compare_ratios(([1.0, 5.0], [1.0, 3.0]), ([1.0, 4.0], [1.0, 3.0]))
    assert found.difference == pytest.approx(0.25) and found.error == pytest.approx(0.125) and found.prompts == 2
    assert found.p_value == pytest.approx(math.erfc(2 / math.sqrt(2)))
    assert compare_ratios(([1.0, 5.0], [1.0, 3.0]), ([1.0, 5.0], [1.0, 3.0])).p_value == 1.0


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32) and mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 512)
    assert 0 < mcnemar(2000, 1500) < 1e-10  # no overflow


def test_scores_are_compared_prompt_by_prompt():
    one, other = [1.0] * 6 + [0.0] * 4, [0.0] * 6 + [0.0] * 4
    found = compare_means(one, other)
    assert found.difference == pytest.approx(0.6) and found.p_value == pytest.approx(2 / 64) and found.is_clear
    # The same means without agreement prompt by prompt: 6 wins, 5 losses.
    assert not compare_means([1.0] * 6 + [0.0] * 5, [0.0] * 6 + [1.0] * 5).is_clear
    graded = compare_means([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert graded.difference == pytest.approx(0.1) and graded.is_clear


def test_intervals_cover_the_true_value_95_times_in_100():
    """Long answers, skewed lengths, and nats that depend on both: the interval of the rate must still be right."""
    generator = np.random.default_rng(0)
    covered, paired, trials, prompts, rate, gain = 0, 0, 1500, 150, 0.7, 0.02
    for _ in range(trials):
        sizes = np.ceil(generator.lognormal(3.0, 0.8, prompts))
        hard = generator.gamma(4.0, 0.25, prompts)  # mean 1, independent of the length
        one = sizes * rate * hard + generator.normal(0, 1, prompts)
        other = sizes * (rate - gain) * hard + generator.normal(0, 1, prompts)
        low, high = ratio(one, sizes).interval
        covered += low <= rate <= high
        found = compare_ratios((one, sizes), (other, sizes))
        paired += abs(found.difference - gain) <= Z95 * found.error
    assert 0.925 <= covered / trials <= 0.965
    assert 0.925 <= paired / trials <= 0.965


def test_the_exact_test_is_rarely_wrong_and_the_paired_one_sees_more():
    generator = np.random.default_rng(1)
    false_alarms, seen, trials, prompts = 0, 0, 1000, 200
    for _ in range(trials):
        hard = generator.random(prompts)
        answers = (generator.random((2, prompts)) < 1 - hard).astype(float)
        false_alarms += compare_means(*answers).is_clear
        better = np.maximum(answers[0], generator.random(prompts) < 0.1)  # the same answers, and a few more
        seen += compare_means(better, answers[0]).is_clear
    assert false_alarms / trials <= 0.055
    assert seen / trials > 0.9


def test_bootstrap_agrees_with_the_error_of_a_paired_mean():
    random = np.random.default_rng(1)
    one, other = random.random((1, 400)), random.random((1, 400))
    as_rows = [[[(float(value), 1.0) for value in seed] for seed in scores] for scores in (one, other)]
    found = bootstrap_difference(*as_rows, samples=2000)
    differences = (one - other)[0]
    assert found.value == pytest.approx(differences.mean())
    assert found.error == pytest.approx(differences.std(ddof=1) / 20, rel=0.06)
    low, high = found.interval
    assert low == pytest.approx(found.value - 1.96 * found.error, abs=0.005) and high > found.value
    # A second seed that says the opposite: the spread between seeds is part of the error.
    swapped = bootstrap_difference([*as_rows[0], *as_rows[1]], [*as_rows[1], *as_rows[0]], samples=500)
    assert swapped.value == pytest.approx(0.0)


def test_holm_by_hand():
    # Sorted: 0.01 x 3, 0.02 x 2, 0.03 x 1, never below the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
