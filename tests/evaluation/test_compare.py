"""Two models compared by one measure on the prompts that both have a value for."""

from __future__ import annotations

import pytest

from spin.alignment.evaluation.compare import Measure
from spin.alignment.evaluation.responses import HeldOutResponses

SHARE = Measure("share", "instructions followed", "0", part="share")


def stored(parts: dict[str, tuple[float, float] | None], nats: float | None = None) -> HeldOutResponses:
    rows = {
        name: {
            "score": None if value is None else float(value[0] == value[1]),
            "parts": None if value is None else [{"name": "share", "total": value[0], "count": value[1]}],
            "nats": nats,
            "tokens": 4,
        }
        for name, value in parts.items()
    }
    return HeldOutResponses({"0": rows})


ONE = stored({"a": (1, 1), "b": (2, 3), "c": (0, 2), "d": None, "e": (1, 1)}, nats=8.0)
OTHER = stored({"a": (0, 1), "b": (1, 3), "c": (1, 2), "d": (1, 1), "f": (1, 1)}, nats=6.0)


def test_a_part_is_a_ratio_over_shared_prompts():
    found = SHARE.compare(ONE, OTHER)
    # Shared: a, b, c. 3/6 against 2/6; residuals y - R x over the mean count of 2: ours (.5, .5, -1)/2, theirs (-1/3, 0, 1/3)/2,
    # differences (5/12, 1/4, -2/3), whose standard deviation is sqrt((25 + 9 + 64) / 144 / 2) and error that over sqrt(3).
    assert found.prompts == 3 and found.difference == pytest.approx(1 / 6)
    assert found.error == pytest.approx((98 / 288) ** 0.5 / 3**0.5)


def test_scores_are_means_and_nats_are_ratios():
    score = Measure("exact", "exact match", "0").compare(ONE, OTHER)
    assert (score.prompts, score.difference) == (3, pytest.approx(1 / 3)) and score.p_value == 1.0  # one win, no loss
    nll = Measure("nll", "NLL", None).compare(ONE, OTHER)
    assert (nll.prompts, nll.difference) == (4, pytest.approx(0.5))


@pytest.mark.parametrize("measure", [SHARE, Measure("none", "a part that no row has", "0", part="x")])
def test_fewer_than_two_prompts_are_not_compared(measure):
    assert measure.compare(ONE, stored({"a": (1, 1)})) is None
