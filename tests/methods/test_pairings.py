"""Pairings of scored responses, worked by hand in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from spin.alignment.core.arithmetic import sigmoid
from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LOSSES, soft_mean
from spin.alignment.methods.pairings import PAIRINGS, check_num_samples, label_rows
from spin.alignment.methods.pairings.base import Labelled

LABELLED = sorted(name for name, pairing in PAIRINGS.items() if isinstance(pairing, Labelled))


def turns(answer):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]


def rows_of(scores, win_probs=None, reference_score=None, prompt_id="p", truth=True):
    rows = [
        {
            "prompt_id": prompt_id,
            "sample_index": index,
            "chosen": turns("truth") if truth else None,
            "rejected": turns(f"{prompt_id}:{index}"),
            "rejected_token_ids": [index, 7],
            "rejected_finish_reason": "stop",
        }
        for index in range(len(scores))
    ]
    label_rows(rows, scores, win_probs, reference_score)
    return rows


def answers(pair):
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def test_best_vs_worst():
    (pair,) = PAIRINGS["best_vs_worst"](rows_of([0.5, 2.0, -1.0, 2.0, -1.0]))
    assert pair == {
        "prompt_id": "p",
        "sample_index": 2,
        "chosen": turns("p:1"),
        "chosen_token_ids": [1, 7],
        "chosen_finish_reason": "stop",
        "chosen_score": 2.0,
        "rejected": turns("p:2"),
        "rejected_token_ids": [2, 7],
        "rejected_finish_reason": "stop",
        "rejected_score": -1.0,
    }


def test_rows_may_come_in_any_order():
    rows = rows_of([0.5, 2.0, -1.0])
    for name in ("best_vs_worst", "win_rate"):
        assert PAIRINGS[name](rows[::-1]) == PAIRINGS[name](rows)


def test_best_vs_random_draws_among_lower_scores_and_can_be_repeated():
    drawn = set()
    for number in range(60):
        rows = rows_of([1.0, 3.0, 2.0, 3.0], prompt_id=f"p{number}")
        (pair,) = PAIRINGS["best_vs_random"](rows)
        assert [pair] == PAIRINGS["best_vs_random"](rows) and pair["chosen_score"] == 3.0
        drawn.add(pair["sample_index"])
    assert drawn == {0, 2}


@pytest.mark.parametrize(("truth", "better"), [(5.0, "truth"), (1.0, "p:1")])
def test_best_vs_ground_truth_chooses_the_higher_score(truth, better):
    (pair,) = PAIRINGS["best_vs_ground_truth"](rows_of([0.0, 3.0, 2.0], reference_score=truth))
    assert set(answers(pair)) == {"truth", "p:1"} and answers(pair)[0] == better
    assert (pair["chosen_score"], pair["rejected_score"]) == (max(truth, 3.0), min(truth, 3.0))
    assert pair["sample_index"] == 1
    ids = {answers(pair)[0]: pair["chosen_token_ids"], answers(pair)[1]: pair["rejected_token_ids"]}
    assert ids == {"truth": None, "p:1": [1, 7]}


def test_best_vs_ground_truth_takes_one_sample():
    (pair,) = PAIRINGS["best_vs_ground_truth"](rows_of([1.0], reference_score=0.0))
    assert answers(pair) == ("p:0", "truth")


def test_win_rates_from_scores():
    # arXiv 2405.00675: P_ik = sigmoid(s_i - s_k), scores 0, log 3, -log 3: sigmoid(log 3) = 3/4, sigmoid(2 log 3) = 9/10;
    # rate of the best (1/4 -> itself 1/2): (3/4 + 1/2 + 9/10) / 3 = 43/60, of the worst (1/4 + 1/10 + 1/2) / 3 = 17/60
    (pair,) = PAIRINGS["win_rate"](rows_of([0.0, math.log(3), -math.log(3)]))
    assert answers(pair) == ("p:1", "p:2")
    assert pair["chosen_win_prob"] == pytest.approx(43 / 60, rel=1e-14)
    assert pair["rejected_win_prob"] == pytest.approx(17 / 60, rel=1e-14)
    assert (pair["chosen_pair_win_prob"], pair["rejected_pair_win_prob"]) == pytest.approx((0.9, 0.1), rel=1e-14)


def test_win_rates_from_a_win_matrix_may_contradict_the_scores():
    # row means: (0.5 + 0.9 + 0.4) / 3 = 0.6, (0.1 + 0.5 + 0.7) / 3 = 13/30, (0.6 + 0.3 + 0.5) / 3 = 7/15
    matrix = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]
    (pair,) = PAIRINGS["win_rate"](rows_of([0.0, 1.0, 2.0], matrix))
    assert answers(pair) == ("p:0", "p:1") and "win_probs" not in pair
    assert (pair["chosen_win_prob"], pair["rejected_win_prob"]) == pytest.approx((0.6, 13 / 30), rel=1e-14)
    assert (pair["chosen_pair_win_prob"], pair["rejected_pair_win_prob"]) == pytest.approx((0.9, 0.1), rel=1e-14)


def test_a_failed_response_leaves_the_win_rates():
    # without sample 0: (0.5 + 0.7) / 2 and (0.3 + 0.5) / 2
    matrix = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]
    (pair,) = PAIRINGS["win_rate"](rows_of([None, 1.0, 2.0], matrix))
    assert (pair["chosen_win_prob"], pair["rejected_win_prob"]) == pytest.approx((0.6, 0.4), rel=1e-14)


def test_win_rates_of_far_scores_do_not_overflow():
    (pair,) = PAIRINGS["win_rate"](rows_of([-1e4, 1e4]))
    assert (pair["chosen_win_prob"], pair["rejected_win_prob"]) == (0.75, 0.25)
    assert sigmoid(-40.0) + sigmoid(40.0) == 1.0


def test_every_sample_takes_two_a_row_with_rewards():
    # soft-mean of 0, log 3, 0, log 3 = log((1 + 3 + 1 + 3) / 4) = log 2
    scores = [0.0, math.log(3)] * 2
    pairs = PAIRINGS["every_sample"](rows_of(scores))
    assert [answers(pair) for pair in pairs] == [("p:0", "p:1"), ("p:2", "p:3")]
    assert [pair["sample_index"] for pair in pairs] == [1, 3]
    for pair in pairs:
        assert pair["chosen_reward"] == pytest.approx(-math.log(2), rel=1e-14)
        assert pair["rejected_reward"] == pytest.approx(math.log(1.5), rel=1e-14)


def test_every_sample_takes_an_odd_number_in_a_ring():
    """Each of three responses is in two rows, on either side, so that all of them count equally."""
    scores = [0.0, math.log(3), math.log(5)]  # soft mean: log((1 + 3 + 5) / 3) = log 3
    pairs = PAIRINGS["every_sample"](rows_of(scores))
    assert [answers(pair) for pair in pairs] == [("p:0", "p:1"), ("p:1", "p:2"), ("p:2", "p:0")]
    rewards = [-math.log(3), 0.0, math.log(5 / 3)]
    for place, pair in enumerate(pairs):
        assert pair["chosen_reward"] == pytest.approx(rewards[place], rel=1e-14, abs=1e-15)
        assert pair["rejected_reward"] == pytest.approx(rewards[(place + 1) % 3], rel=1e-14, abs=1e-15)


@pytest.mark.parametrize(
    ("scores", "expected", "left_over"),
    [
        ([0.0, None, 1.0], [(0, 2), (2, 0)], 0),  # both still twice, as the responses to other prompts
        ([None, None, 1.0], [], 0),
        ([0.0, None, 1.0, 2.0], [(0, 2)], 1),  # of an even number, each once: the last has no partner
    ],
)
def test_every_sample_where_the_scorer_failed(scores, expected, left_over):
    rows = rows_of(scores)
    pairs = PAIRINGS["every_sample"](rows)
    assert [answers(pair) for pair in pairs] == [(f"p:{one}", f"p:{other}") for one, other in expected]
    assert PAIRINGS["every_sample"].unpaired(rows) == left_over


def test_every_sample_of_one_response_is_relative_to_the_batch():
    rows = rows_of([2.5])
    assert PAIRINGS["every_sample"](rows) == []
    (pair,) = PAIRINGS["every_sample"].for_baseline("batch")(rows)
    assert answers(pair) == ("p:0", "p:0") and (pair["chosen_score"], pair["rejected_score"]) == (2.5, 2.5)
    assert PAIRINGS["best_vs_worst"].for_baseline("batch").min_samples == 2


def test_every_sample_keeps_equal_scores():
    pairs = PAIRINGS["every_sample"](rows_of([1.0, 1.0]))
    assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs] == [(0.0, 0.0)]


def test_the_soft_mean_of_numbers_is_that_of_a_tensor():
    scores = [0.3, -2.0, 700.0, 699.0]
    assert soft_mean(scores) == pytest.approx(soft_mean(torch.tensor(scores, dtype=torch.double)).item(), rel=1e-14)


@pytest.mark.parametrize("name", [name for name in LABELLED if name != "every_sample"])
@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [None, None, 1.0], [None, None, None]])
def test_a_tie_gives_no_pair(name, scores):
    assert PAIRINGS[name](rows_of(scores, reference_score=1.0)) == []


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_pairs_stay_with_their_prompt(name, size):
    draw = random.Random(size)
    for number in range(30):
        scores = [draw.choice([None, -1.0, 0.0, 1.0, draw.gauss(0, 1)]) for _ in range(size)]
        rows = rows_of(scores, reference_score=draw.gauss(0, 1), prompt_id=f"p{number}")
        draw.shuffle(rows)
        pairs = PAIRINGS[name](rows)
        assert len({pair["sample_index"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert pair["prompt_id"] == f"p{number}"
            assert set(PAIRINGS[name].adds) <= pair.keys()
            for half, answer in zip(("chosen", "rejected"), answers(pair), strict=True):
                if answer != "truth":
                    sample = int(answer.removeprefix(f"p{number}:"))
                    assert pair[f"{half}_score"] == scores[sample] is not None
                    assert pair[f"{half}_token_ids"] == [sample, 7]
            if name != "every_sample":
                assert pair["chosen_score"] > pair["rejected_score"]


def test_every_label_a_loss_needs_is_written_by_a_pairing():
    written = {name for pairing in PAIRINGS.values() for name in getattr(pairing, "adds", ())}
    assert {column for loss in LOSSES.values() for label in loss.labels for column in label.columns} <= written


@pytest.mark.parametrize(
    ("name", "samples", "sentence"),
    [
        (
            "best_vs_worst",
            1,
            "needs at least 2 responses per prompt, but there is 1: sample with --num_samples 2 or more",
        ),
        ("win_rate", 1, "pairing win_rate needs at least 2 responses"),
        ("every_sample", 1, "pairing every_sample needs at least 2 responses"),
    ],
)
def test_a_number_of_samples_that_cannot_be_paired(name, samples, sentence):
    with pytest.raises(InputError, match=sentence):
        check_num_samples(name, PAIRINGS[name], samples)


@pytest.mark.parametrize(("name", "samples"), [("ground_truth", 1), ("best_vs_ground_truth", 1), ("every_sample", 3)])
def test_a_number_of_samples_that_can(name, samples):
    check_num_samples(name, PAIRINGS[name], samples)


@pytest.mark.parametrize("name", ["ground_truth", "best_vs_ground_truth"])
def test_a_prompt_without_ground_truth_is_named(name):
    rows = rows_of([1.0, 2.0], prompt_id="p17", truth=False)
    with pytest.raises(
        InputError,
        match=f"prompt p17 has no ground truth, which pairing {name} compares with: add it and generate again",
    ):
        PAIRINGS[name](rows)


def test_rows_without_labels_are_refused():
    row = {"prompt_id": "p3", "sample_index": 0, "rejected": turns("a")}
    with pytest.raises(InputError, match="prompt p3 has no rejected_score: score the responses with a scorer first"):
        PAIRINGS["best_vs_worst"]([row, row])


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        ([[0.5, 0.6], [0.5, 0.5]], "samples 0 and 1 of prompt p are 0.6 and 0.5: they must add up to 1"),
        ([[0.5, 1.5], [-0.5, 0.5]], "samples 0 and 1 of prompt p is 1.5: it must be from 0 to 1"),
        ([[0.5, math.nan], [0.5, 0.5]], "is nan: it must be from 0 to 1"),
        ([[0.6, 0.5], [0.5, 0.5]], "samples 0 and 0 of prompt p are 0.6 and 0.6"),
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], "of prompt p are 2 x 3, not 2 x 2"),
        ([[0.5]], "of prompt p are 1 x 1, not 2 x 2"),
    ],
)
def test_a_win_matrix_that_contradicts_itself(matrix, sentence):
    with pytest.raises(InputError, match=sentence):
        rows_of([1.0, 2.0], matrix)


@pytest.mark.parametrize(
    ("scores", "reference", "sentence"),
    [
        ([1.0, math.inf], None, "prompt p, sample 1, is inf: the scorer must return finite scores"),
        ([1.0, 2.0], math.nan, "prompt p, the ground truth, is nan"),
    ],
)
def test_a_score_that_is_not_finite(scores, reference, sentence):
    with pytest.raises(InputError, match=sentence):
        rows_of(scores, reference_score=reference)


def test_another_number_of_scores_is_refused():
    rows = rows_of([1.0, 2.0])
    with pytest.raises(InputError, match="returned 3 scores for the 2 responses of prompt p"):
        label_rows(rows, [1.0, 2.0, 3.0])


def test_win_probabilities_of_some_rows_only_are_refused():
    rows = rows_of([1.0, 2.0], [[0.5, 0.4], [0.6, 0.5]])
    rows[1]["win_probs"] = None
    with pytest.raises(InputError, match="only some responses to prompt p have win probabilities"):
        PAIRINGS["win_rate"](rows)
