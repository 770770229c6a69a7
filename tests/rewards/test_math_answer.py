"""Which text of a solution is its final answer: headings are none, and what graders read is read."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from spin.alignment.rewards import find_scorer
from spin.alignment.rewards.math_answer import final_answer, final_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # A Markdown heading is not an answer, whatever number it has.
        ("#### Step 2: Add them\n3 + 4 = 7\nThe answer is 7.", 7),
        ("#### Step 2: Add them", None),
        ("#### Step 2", None),
        ("#### 2. Compute the total\nso 72", 72),
        ("#### 1) First\n2\n#### 8", 8),
        ("#### **Step 1:** add\nso 72", 72),
        ("#### Case A. even\n4", 4),
        ("#### Calculating the total\nwe get 72", 72),
        ("#### Final Answer\n\n72", 72),
        ("#### Final Answer:\n72", 72),
        ("#### **Final Answer**\n\n\\boxed{72}", 72),
        ("##### 5\nthe answer is 6", 6),
        ("### 5\nthe answer is 6", 6),
        # The last line that is a number counts, also if headings follow.
        ("#### 72\n#### Step 3: check it\nfine, 3 is odd", 72),
        ("#### 71\n#### 72\nand more", 72),
        ("#### Step 1\n2\n#### -3\n", -3),
        ("#### Answer: 72", 72),
        ("#### The answer is **72**", 72),
        ("#### Final answer: \\boxed{\\frac{1}{2}}", Fraction(1, 2)),
        ("#### Total: 5", 5),
        ("#### 3 apples are left over", 3),
        ("#### \u22125", -5),
        ("\\boxed{\u22125}", -5),
        ("#### $1,234.50", Fraction(2469, 2)),
        ("####72", 72),
        ("#### 10%", 10),
        # What is no single number is compared whole.
        ("#### 12:30", "12:30"),
        ("#### 3, 5", "3,5"),
        ("#### Monday", "Monday"),
        ("#### not enough", "notenough"),
        ("#### yes\nindeed", "yes"),
        # Boxes.
        ("#### Step 1\n\\boxed{5}\n#### Check\nok", 5),
        ("#### 5\n\\boxed{6}", 6),
        ("\\boxed{\\frac{a}{\\sqrt{b}}} in 3 steps", "\\fraca{\\sqrtb}"),
        ("\\boxed{\\text{so } \\{1, {2}\\}}", "so\\{1,2\\}"),
        ("$\\boxed 5$ in 3 steps", 5),
        ("\\boxed 7. Done in 3 steps", 7),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_the_case_of_the_heading():
    score = find_scorer("math_answer")
    response = "#### Step 1: count\nThere are 3.\n\n#### Step 2: add\n3 + 4 = 7, so the answer is 7."
    assert score("", response, "3 + 4 = 7\n#### 7") == 1.0
    assert score("", response, "1 + 1 = 2\n#### 2") == 0.0
    assert final_number(response) == 7


@pytest.mark.parametrize("filler", [" ", "a ", "1 ", "*", "(", "#", "{", "\\boxed "])
def test_long_lines_take_no_time(filler):
    start = time.process_time()
    final_answer("#### a" + filler * 30_000 + "b: c")
    assert time.process_time() - start < 2
