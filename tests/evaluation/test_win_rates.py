"""Win rates, also at equal lengths, against arithmetic by hand; and responses compared by a scorer in both orders."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spin.alignment.evaluation.judged import Baseline, first_wins, judge_rows, win_rate_by_scores, win_rate_of
from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.evaluation.statistics import wilson
from spin.alignment.evaluation.win_rates import length_controlled, win_rate
from spin.alignment.rewards import GroupLabels


def test_ties_count_half():
    found = win_rate([1.0, 1.0, 0.0, 0.5], [0, 0, 0, 0])
    # (1 + 1 + 0 + 1/2) / 4; variance (2 * .375^2 + .625^2 + .125^2) / 3 = 0.2292, error its root over 2.
    assert found.rate.value == 0.625 and found.rate.error == pytest.approx(math.sqrt(0.6875 / 3) / 2)
    assert (found.wins, found.losses, found.prompts) == (2, 1, 4) and found.p_value == 1.0
    assert found.ties.value == 0.25 and found.ties.interval == wilson(1, 4)
    assert found.as_row()["lc_win_rate"] == pytest.approx((2.5 + 0.5) / 5)


def test_equal_lengths_leave_the_win_rate_with_one_tie_added():
    # Without differences in length the fit is sigmoid(theta) = (sum y + 1/2) / (N + 1), the tie being the prior.
    for values in ([1.0] * 9, [1.0, 0.0, 1.0], [0.25, 0.75, 0.5, 0.9]):
        found = length_controlled(values, [3.0] * len(values))
        assert found.value == pytest.approx((sum(values) + 0.5) / (len(values) + 1))
        assert 0 < found.interval[0] < found.value < found.interval[1] < 1


def test_wins_by_length_alone_are_no_wins_at_equal_lengths():
    # Longer wins, shorter loses, whichever model it is; the model is longer on 3 of 4 prompts.
    excess = [100.0, 100.0, 100.0, -100.0] * 25
    values = [float(d > 0) for d in excess]
    found = win_rate(values, excess)
    assert found.rate.value == 0.75 and found.controlled.value < 0.65
    assert found.controlled.interval[0] < 0.5


def test_the_fit_is_the_maximum_of_the_penalised_likelihood():
    random = np.random.default_rng(3)
    excess, values = random.normal(20, 50, 40), random.random(40)
    found = length_controlled(values.tolist(), excess.tolist())
    x = np.tanh(excess / excess.std())

    def loss(theta, phi):
        p = 1 / (1 + np.exp(-(theta + phi * x)))
        prior = 1 / (1 + math.exp(-theta))
        fit = -(values * np.log(p) + (1 - values) * np.log(1 - p)).sum()
        return fit - 0.5 * (math.log(prior) + math.log(1 - prior)) + phi**2 / 2

    grid = np.linspace(-1, 1, 201)
    best = min(((loss(theta, phi), theta) for theta in grid for phi in grid), key=lambda item: item[0])
    assert math.log(found.value / (1 - found.value)) == pytest.approx(best[1], abs=0.011)


def test_exchanging_the_models_gives_one_minus_the_result():
    values, excess = [1.0, 0.0, 1.0, 0.5, 0.8, 1.0], [10.0, -5.0, 40.0, 0.0, 3.0, -7.0]
    one = length_controlled(values, excess)
    other = length_controlled([1 - value for value in values], [-d for d in excess])
    assert other.value == pytest.approx(1 - one.value) and other.error == pytest.approx(one.error)


def test_the_interval_covers_the_rate_at_equal_lengths():
    random, covered, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        excess = random.normal(30, 100, 150)
        p = 1 / (1 + np.exp(-(0.4 + 0.8 * np.tanh(excess / excess.std()))))
        low, high = length_controlled((random.random(150) < p).astype(float).tolist(), excess.tolist()).interval
        covered += low <= 1 / (1 + math.exp(-0.4)) <= high
    assert covered / runs > 0.9


class LongerWins:
    """Compares a pair as a judge does that prefers the longer response with probability 0.8."""

    def label(self, groups):
        labels = []
        for group in groups:
            first, second = map(len, group.responses)
            p = 0.5 if first == second else 0.8 if first > second else 0.2
            labels.append(GroupLabels([(0.5 + p) / 2, (1.5 - p) / 2], [[0.5, p], [1 - p, 0.5]]))
        return labels


class Prompt:
    messages, ground_truth, columns = [{"role": "user", "content": "q"}], None, {}


def row(name, response, score=None, index=0):
    return {"prompt_id": name, "response": response, "score": score, "sample_index": index, "temperature": 0.0}


def stored(*rows):
    found = HeldOutResponses()
    for item in rows:
        found.add(item)
    return found


def test_rows_are_judged_against_the_same_sample_of_a_baseline():
    theirs = stored(row("a", "xx"), row("a", "xxxx", index=1), row("b", "x"))
    own = [row("a", "xxx"), row("a", "xxx", index=1), row("b", "x"), row("c", "only ours")]
    judge_rows(own, dict.fromkeys("abc", Prompt()), Baseline("sft", "judge", theirs), LongerWins())
    assert [item.get("wins") and item["wins"][0]["value"] for item in own] == [0.8, 0.2, 0.5, None]
    found = win_rate_of(own, {name: theirs.all_of("0", name) for name in "ab"}, "sft")
    # Prompt a: the mean of 0.8 and 0.2; prompt b: a tie.
    assert found.prompts == 2 and found.rate.value == pytest.approx(0.5) and found.ties.value == 1.0
    assert win_rate_of(own, {}, "iter0") is None


def test_a_pointwise_scorer_lets_the_higher_score_win():
    assert [first_wins(GroupLabels([a, b])) for a, b in ((2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (None, 1.0))] == [
        1.0, 0.5, 0.0, None
    ]  # fmt: skip
    one = stored(row("a", "12", 0.9), row("b", "1", 0.2), row("c", "1", None))
    other = stored(row("a", "1", 0.1), row("b", "1", 0.2), row("c", "1", 0.5), row("d", "1", 0.5))
    found = win_rate_by_scores(one, other, "0")
    assert (found.prompts, found.wins, found.losses, found.rate.value) == (2, 1, 0, 0.75)
    assert win_rate_by_scores(one, other, "1") is None
