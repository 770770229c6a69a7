"""Token weights against arithmetic worked by hand, in float64."""

import itertools
import math
import random
import time

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.methods.weightings import (
    WEIGHT_TRANSFORMS,
    WEIGHTINGS,
    PairTokens,
    check_transform,
    side_settings,
    weights_of_pair,
)
from spin.alignment.methods.weightings.drift import common_subsequence
from spin.alignment.token_weights.align_tokens import aligned_gains, character_logps, token_spans


def approx(values):
    return pytest.approx(values, rel=1e-12, abs=1e-12)


# --- transforms -------------------------------------------------------------------------------------------------------


def test_exponential_is_equation_11_of_tis_dpo():
    # k exp(mu clamp(d, L, U)) with k = 1, mu = 1, L = -0.5, U = 1.5
    expected = [math.exp(-0.5), math.exp(-0.25), 1.0, math.e, math.exp(1.5)]
    assert WEIGHT_TRANSFORMS["exponential"]([-3.0, -0.25, 0.0, 1.0, 9.0]) == approx(expected)
    # k = 2, mu = 0.5: 2 exp(0.5 * 1) and, clamped at 1.5, 2 exp(0.75)
    assert WEIGHT_TRANSFORMS["exponential"]([1.0, 2.0], k=2, mu=0.5) == approx([2 * math.exp(0.5), 2 * math.exp(0.75)])


def test_rejected_side_is_equation_11_with_minus_mu():
    """The paper clamps d first: k exp(-mu clamp(d, L, U)); d = 2 gives exp(-1.5), d = -2 gives exp(0.5)."""
    pair = PairTokens([1, 2], [3, 4], [2.0, -2.0], [2.0, -2.0])
    chosen, rejected = weights_of_pair("reverse_dpo", pair)
    assert chosen == approx([math.exp(1.5), math.exp(-0.5)])
    assert rejected == approx([math.exp(-1.5), math.exp(0.5)])
    assert side_settings("exponential", {"lower": -1.0}, "rejected") == {"lower": -1.5, "upper": 1.0}
    assert side_settings("threshold", {"lower": -1.0}, "rejected") == {"lower": -1.0}


def test_origin_is_as_is_and_the_sign_is_turned_before_it():
    pair = PairTokens([1, 2], [3, 4], [0.25, -3.0], [0.25, -3.0])
    assert weights_of_pair("teacher", pair, "origin") == ([0.25, -3.0], [-0.25, 3.0])


def test_binary_takes_as_many_tokens_as_tis_dpo_does():
    binary = WEIGHT_TRANSFORMS["binary"]
    assert binary([0.1, 0.4, 0.3, 0.2]) == [0.0, 1.0, 1.0, 0.0]  # the top half
    assert binary([0.1, 0.4, 0.3, 0.2], top_percent=30) == [0.0, 1.0, 0.0, 0.0]  # int(1.2) = 1 token
    assert binary([0.1, 0.4, 0.3, 0.2], top_percent=24) == [0.0] * 4  # int(0.96) = 0
    assert binary([1.0, 0.0, 1.0, 1.0], top_percent=25) == [0.0] * 4  # one of three equal tokens: none of them
    assert binary([1.0, 0.0, 1.0, 2.0], top_percent=75) == [1.0, 0.0, 1.0, 1.0]
    assert binary([5.0, 6.0], top_percent=0) == [0.0, 0.0] and binary([5.0, 6.0], top_percent=100) == [1.0, 1.0]
    assert binary([], top_percent=50) == []


@pytest.mark.parametrize(
    "transform, given, found",
    [
        ("binary", {"p": "30"}, {"top_percent": 30.0}),
        ("threshold", {"lower_threshold": -2, "upper_threshold": 2}, {"lower": -2.0, "upper": 2.0}),
        ("threshold_and_scale", {"min_val": -2, "max_scale": 1.4}, {"lower": -2.0, "high": 1.4}),
        ("rank_based", {"min_scale": 0.5, "max_scale": 1.5}, {"low": 0.5, "high": 1.5}),
        ("random", {"min_val": 0.5}, {"low": 0.5}),
    ],
)
def test_settings_under_earlier_names_and_those_of_tis_dpo(transform, given, found):
    assert check_transform(transform, given) == found


def test_threshold_clips():
    assert WEIGHT_TRANSFORMS["threshold"]([-2.0, -0.5, 0.5, 7.0]) == [-1.0, -0.5, 0.5, 1.0]


def test_threshold_and_scale_maps_the_clipped_range():
    # [-1.5, 1.5] -> [0.7, 1.3]: slope 0.2, 0 -> 1.0, 0.5 -> 1.1
    values = WEIGHT_TRANSFORMS["threshold_and_scale"]([-9.0, -1.5, 0.0, 0.5, 1.5, 9.0])
    assert values == approx([0.7, 0.7, 1.0, 1.1, 1.3, 1.3])


def test_rank_based_is_linear_in_the_rank_and_ties_share_their_mean():
    rank_based = WEIGHT_TRANSFORMS["rank_based"]
    assert rank_based([30.0, -1.0, 2.0, 1.0]) == approx([1.3, 0.7, 1.1, 0.9])
    # ranks 0, (1 + 2) / 2, (1 + 2) / 2, 3 of 3: 0.7 + 0.6 * 0.5 = 1.0
    assert rank_based([5.0, 5.0, 9.0, 0.0]) == approx([1.0, 1.0, 1.3, 0.7])
    assert rank_based([4.0]) == approx([1.0]) and rank_based([4.0, 4.0]) == approx([1.0, 1.0]) and rank_based([]) == []


def test_random_is_seeded_and_within_its_range():
    draw = WEIGHT_TRANSFORMS["random"]
    values = draw([0.0] * 4000, seed=3)
    assert values == draw([9.0] * 4000, seed=3) != draw([0.0] * 4000, seed=4)
    assert min(values) >= 0.7 and max(values) <= 1.3
    # uniform: mean 1, standard error 0.6 / sqrt(12 * 4000) = 0.0027
    assert sum(values) / 4000 == pytest.approx(1.0, abs=0.012)
    pair = PairTokens([1, 2], [3, 4], [0.0, 0.0], [0.0, 0.0])
    chosen, rejected = weights_of_pair("teacher", pair, "random", {}, (1, 2))
    assert chosen != rejected


@pytest.mark.parametrize("name", sorted(WEIGHT_TRANSFORMS))
def test_every_transform_gives_a_weight_for_each_token(name):
    assert len(WEIGHT_TRANSFORMS[name]([0.3, -0.2, 0.3])) == 3 and WEIGHT_TRANSFORMS[name]([]) == []


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("exp", {}, "unknown transform 'exp': choose one of binary, exponential"),
        ("exponential", {"my": "1"}, "contains 'my', which transform exponential does not take: it takes k, mu"),
        ("origin", {"k": "1"}, "it takes no settings"),
        ("exponential", {"mu": "big"}, "mu in transform_params is 'big': set it to a number"),
        ("exponential", {"mu": "nan"}, "mu in transform_params is 'nan'"),
        ("exponential", {"k": "0"}, "k is 0.0: set it above 0"),
        ("exponential", {"lower": "2"}, "lower is 2.0 and upper is 1.5"),
        ("binary", {"p": "101"}, "top_percent is 101.0: set it from 0 to 100"),
        ("binary", {"p": "30", "top_percent": "40"}, "contains 'p' and 'top_percent', which are the same setting"),
        ("random", {"seed": "1.5"}, "seed in transform_params is '1.5': set it to a whole number"),
        ("rank_based", {"low": "1.3"}, "low is 1.3 and high is 1.3"),
    ],
)
def test_bad_settings_are_one_sentence(name, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        check_transform(name, settings)


def test_settings_become_numbers():
    assert check_transform("exponential", {"mu": "0.5", "k": 2}) == {"mu": 0.5, "k": 2.0}


# --- weightings -------------------------------------------------------------------------------------------------------


def test_uniform_weighs_every_token_end_of_turn_included():
    assert weights_of_pair("uniform", PairTokens([5, 6, 2], [7, 2])) == ([1.0] * 3, [1.0] * 2)


def test_tokens_that_were_not_scored_have_no_weight():
    pair = PairTokens([1, 2, 3], [4, 5], [0.0, 0.0], [0.0])
    chosen, rejected = weights_of_pair("reverse_dpo", pair)
    assert chosen[:2] == [1.0, 1.0] and math.isnan(chosen[2]) and rejected[0] == 1.0 and math.isnan(rejected[1])
    with pytest.raises(ValueError, match="2 gains for a response of 1 tokens"):
        weights_of_pair("reverse_dpo", PairTokens([1], [2], [0.0, 0.0], [0.0]))


def test_drift_masks_what_both_have_in_common():
    # "2 + 3 = 5 EOS" against "2 + 3 = 6 EOS": only the answers differ, and the common EOS is masked
    pair = PairTokens([2, 90, 3, 91, 5, 0], [2, 90, 3, 91, 6, 0])
    assert weights_of_pair("drift", pair) == ([0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0])
    # a b c b d a b against b d c a b a: the longest common subsequences have 4 tokens (b c b a, b d a b, b c a b)
    chosen, rejected = weights_of_pair("drift", PairTokens(list("abcbdab"), list("bdcaba")))
    assert (sum(chosen), sum(rejected)) == (3, 2)
    assert weights_of_pair("drift", PairTokens([1, 2], [3])) == ([1, 1], [1])


def _table(left, right):
    rows = [[0] * (len(right) + 1)]
    for token in left:
        row = [0]
        for index, other in enumerate(right):
            row.append(rows[-1][index] + 1 if token == other else max(rows[-1][index + 1], row[-1]))
        rows.append(row)
    return rows[-1][-1]


def test_common_subsequence_is_a_longest_one():
    draw = random.Random(0)
    for _ in range(500):
        left, right = ([draw.randrange(4) for _ in range(draw.randrange(14))] for _ in range(2))
        found = common_subsequence(left, right)
        assert all(left[i] == right[j] for i, j in found)
        assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(found))
        assert len(found) == _table(left, right)


def test_common_subsequence_of_long_responses_is_quick():
    draw = random.Random(1)
    left, right = ([draw.randrange(3000) for _ in range(2000)] for _ in range(2))
    started = time.perf_counter()
    common_subsequence(left, right)
    assert time.perf_counter() - started < 1.0


def test_which_weightings_need_models():
    assert {name: item.needs_models for name, item in WEIGHTINGS.items()} == {
        "drift": False,
        "reverse_dpo": True,
        "stored_gains": False,
        "teacher": True,
        "uniform": False,
    }


# --- alignment by characters ------------------------------------------------------------------------------------------


def test_equal_cuts_give_the_exact_gains():
    spans = [(0, 3), (3, 4), (4, 9)]
    shares = character_logps([-1.5, -0.25, -4.0], spans, 9)
    assert aligned_gains(shares, [-2.0, -0.5, -1.0], spans) == approx([0.5, 0.25, -3.0])


def test_a_token_gives_each_of_its_characters_an_equal_share():
    # the teacher cuts ab|cdef at -1 and -2 nats, the student a|bcd|ef at -1 each:
    # its tokens take -0.5; -0.5 - 2 * 0.5 = -1.5; -1.0
    shares = character_logps([-1.0, -2.0], [(0, 2), (2, 6)], 6)
    gains = aligned_gains(shares, [-1.0, -1.0, -1.0], [(0, 1), (1, 4), (4, 6)])
    assert gains == approx([0.5, -0.5, 0.0])
    assert sum(gains) == approx((-1.0 - 2.0) - (-3.0))  # the sum over the response is kept


def test_a_character_of_several_tokens():
    # one character that the teacher writes as two byte tokens and the student as three
    shares = character_logps([-1.0, -2.0, -4.0], [(0, 1), (0, 1), (1, 2)], 2)
    gains = aligned_gains(shares, [-1.0, -1.0, -1.3, -1.0], [(0, 0), (0, 0), (0, 1), (1, 2)])
    assert gains == approx([0.1, 0.1, 0.1, -3.0])


def test_tokens_behind_the_last_scored_one_have_no_gain():
    shares = character_logps([-1.0], [(0, 2), (2, 4)], 4)
    assert aligned_gains(shares, [-1.0, -1.0, -1.0], [(0, 1), (1, 2), (2, 4)]) == approx([0.5, 0.5])
    shares = character_logps([-1.0, -1.0], [(0, 2), (2, 4)], 4)
    assert aligned_gains(shares, [-1.0], [(0, 2), (2, 4)]) == approx([0.0])


def test_text_the_teacher_never_saw_gains_nothing():
    # the teacher's template strips the leading space
    shares = character_logps([-1.0], [(1, 3)], 3)
    assert aligned_gains(shares, [-7.0, -2.0], [(0, 1), (1, 3)]) == approx([0.0, 1.0])
    assert aligned_gains([], [-3.0], [(0, 0)]) == [0.0]


def test_a_token_in_front_joins_the_first_character():
    shares = character_logps([-0.5, -1.0], [(0, 0), (0, 2)], 2)
    assert shares == approx([-1.0, -0.5])


BYTES = [b"Hi", b" ", b"\xf0\x9f", b"\x98\x80", b"!", b"<end>"]


def decode(ids):
    """As byte-level tokenizers do: bytes that make no character yet are a replacement sign; the special last id is left out."""
    return b"".join(BYTES[i] for i in ids if i != 5).decode(errors="replace")


def test_spans_of_ids():
    text, spans = token_spans(decode, [0, 1, 2, 3, 4, 5])
    assert text == "Hi \U0001f600!" and spans == [(0, 2), (2, 3), (3, 3), (3, 4), (4, 5), (5, 5)]
    assert token_spans(decode, []) == ("", [])
    cut, spans = token_spans(decode, [0, 2])  # cut in the middle of a character
    assert cut == "Hi\ufffd" and spans == [(0, 2), (2, 3)]


def test_spans_of_a_decoder_that_looks_further_back():
    words = ["a", "b", "c"]

    def shouting(ids):  # the text of a token depends on how many stand before it
        return "".join(words[i].upper() if place > 2 else words[i] for place, i in enumerate(ids))

    assert token_spans(shouting, [0, 1, 2, 0, 1]) == ("abcAB", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)])
