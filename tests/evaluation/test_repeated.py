"""Several responses to a prompt, their diversity, and averages over them, against arithmetic by hand."""

from __future__ import annotations

import itertools

import pytest

from spin.alignment.evaluation.averages import average_responses
from spin.alignment.evaluation.repeated import ks_of, majority_score, pass_at_k
from spin.alignment.evaluation.text_measures import distinct_n, repetition_rate
from spin.alignment.rewards import find_answer


@pytest.mark.parametrize(("count", "right", "k"), [(4, 0, 2), (4, 1, 2), (5, 2, 3), (4, 4, 1), (3, 1, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(count, right, k):
    draws = list(itertools.combinations([1] * right + [0] * (count - right), k))
    assert pass_at_k(count, right, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_more_than_there_are_is_refused():
    assert ks_of(4) == [1, 2, 4] and ks_of(6) == [1, 2, 4, 6] and ks_of(1) == [1]
    with pytest.raises(ValueError, match="at least 5"):
        pass_at_k(4, 1, 5)


def test_the_majority_decides():
    assert majority_score(["7", "7", "8", None], [1.0, 1.0, 0.0, 0.0]) == 1.0
    assert majority_score(["7", "8"], [1.0, 0.0]) == 0.5  # one of the two is drawn
    assert majority_score([None, None], [0.0, 0.0]) == 0.0 and majority_score([None, "7"], [0.0, 1.0]) == 1.0


def test_answers_are_extracted_where_the_metric_reads_them():
    answer = find_answer("math_answer")
    assert answer("4+3 is\n#### 7") == answer("\\boxed{7.0}") and answer("none") is None
    assert find_answer("exact_match")(" 7 ") == "7"
    assert (
        find_answer("format") is None and find_answer("math_answer+0.1*format") is None and find_answer("judge") is None
    )


def test_distinct_and_repeated_ngrams():
    # Bigrams: 12 23 | 12 21 12 -> {12, 23, 21} of 5.
    assert distinct_n([[1, 2, 3], [1, 2, 1, 2]], 2) == pytest.approx(3 / 5) and distinct_n([[1]], 2) is None
    # 4-grams of 1 2 3 4 1 2 3 4: 1234 2341 3412 4123 1234, one of five had been there.
    assert repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5) and repetition_rate([1, 1, 1]) == 0.0


def row(name, index, text, score, ids=(1, 2), reason="stop"):
    facts = {"prompt_id": name, "sample_index": index, "response": text, "score": score, "ground_truth": "#### 7"}
    return facts | {"token_ids": list(ids), "finish_reason": reason, "parts": None}


def test_a_prompt_counts_once_whatever_the_number_of_its_responses():
    rows = [row("a", 0, "#### 7", 1.0), row("b", 0, "#### 1", 0.0, (5, 6, 7), "length")]
    rows += [
        row("a", 1, "#### 7", 1.0),
        row("b", 1, "#### 7", 1.0),
        row("a", 2, "#### 3", 0.0),
        row("b", 2, "none", 0.0),
    ]
    found = average_responses(rows, find_answer("math_answer"))
    # a: 2 of 3, b: 1 of 3. The error is that of two prompts, |2/3 - 1/3| / 2, not of six responses.
    assert found["exact"] == pytest.approx(1 / 2) and found["exact_se"] == pytest.approx(1 / 6)
    assert found["pass@1"] == pytest.approx(1 / 2) and found["pass@3"] == 1.0
    assert found["pass@2"] == pytest.approx((1 + 2 / 3) / 2)  # a: every pair has a right one; b: two of three
    assert found["maj@3"] == pytest.approx((1 + 1 / 2) / 2)  # b: 1 and 7 are equally frequent
    assert found["finished_rate"] == pytest.approx(5 / 6) and found["truncation_rate"] == pytest.approx(1 / 6)
    # Without the ids that ended them: five times 1, once 5 6 7.
    assert found["distinct_1"] == pytest.approx(4 / 8) and found["mean_length"] == pytest.approx((2 + 7 / 3) / 2)


def test_graded_scores_have_no_pass_at_k():
    found = average_responses([row("a", 0, "x", 0.5), row("a", 1, "y", 1.0)])
    assert found["exact"] == 0.75 and not [key for key in found if "@" in key]
