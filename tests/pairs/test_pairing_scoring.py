"""Pairings and rule-based scorers, worked by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spin.alignment.methods.pairings import PAIRINGS
from spin.alignment.rewards import SCORERS
from spin.alignment.rewards.math_answer import final_number


def test_ground_truth_pairs_every_sample_as_it_is():
    rows = [{"prompt_id": "a", "sample_index": index, "chosen": ["c"], "rejected": [index]} for index in range(3)]
    pairs = PAIRINGS["ground_truth"](rows)
    assert pairs == rows and pairs[0] is not rows[0]


@pytest.mark.parametrize(("response", "score"), [("5", 1.0), (" 5\n", 1.0), ("5.0", 0.0), ("", 0.0)])
def test_exact_match(response, score):
    assert SCORERS["exact_match"]("2+3?", response, "5") == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", Fraction(72)),
        ("#### $1,234.50", Fraction(12345, 10)),
        ("#### -3", Fraction(-3)),
        ("####  ", None),
        ("so 7 #### 8 or 9", Fraction(8)),
        (r"thus \boxed{42}.", Fraction(42)),
        (r"first \boxed{1}, then \boxed{-2}", Fraction(-2)),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{x = \text{about } 0.5}", Fraction(1, 2)),
        ("The answer is 3/4", Fraction(3, 4)),
        ("We have 10-3", Fraction(3)),
        ("half of it:\n- 3 apples", Fraction(3)),
        ("1\t/ 2", Fraction(1, 2)),
        ("It costs 5, 6 or 1,000,000.", Fraction(1000000)),
        ("the numbers are 1,2", Fraction(2)),
        ("about .5", Fraction(1, 2)),
        ("7/0", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_math_answer_compares_numbers_not_texts():
    score = SCORERS["math_answer"]
    assert score("q", "it is 72.0", "… #### 72") == 1.0
    assert score("q", r"\boxed{0.75}", "#### 3/4") == 1.0
    assert score("q", "#### 71", "#### 72") == 0.0
    assert score("q", "I do not know", "no idea") == 0.0
