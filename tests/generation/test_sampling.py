"""Drawing a token from logits, against plain arithmetic in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from spin.alignment.generation.base import SamplingConfig
from spin.alignment.generation.transformers.sampling import NOT_FINITE, draw_tokens, penalise, token_logprobs


def reference_probabilities(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """Temperature, min_p, top_k, top_p in this order, over Python floats, sorted and summed one by one."""
    scaled = [value / sampling.temperature for value in logits]
    highest = max(scaled)
    weights = [math.exp(value - highest) for value in scaled]
    if sampling.min_p:
        weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if sampling.top_k:
        edge = sorted(weights, reverse=True)[: sampling.top_k][-1]
        weights = [weight if weight >= edge else 0.0 for weight in weights]
    held, total = 0.0, math.fsum(weights)
    for edge in sorted(weights, reverse=True):
        held += edge
        if held >= sampling.top_p * total:
            weights = [weight if weight >= edge else 0.0 for weight in weights]
            break
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def inverse(probabilities: list[float], uniform: float) -> tuple[int, float]:
    """The first token whose cumulative probability exceeds the number, and how far the number is from any step."""
    cumulative = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)
    token = int((cumulative > uniform).nonzero()[0]) if uniform < cumulative[-1] else int((cumulative < 1).sum())
    return token, float((cumulative - uniform).abs().min())


@pytest.mark.parametrize("vocabulary", [7, 256, 1000, 33_000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 0.05},
        {"temperature": 1.3, "min_p": 0.01, "top_k": 50, "top_p": 0.7},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()) or "plain",
)
def test_tokens_are_those_of_the_inverse_cdf_in_double_precision(vocabulary, settings):
    torch.manual_seed(vocabulary)
    rows, sampling = 4, SamplingConfig(**settings)
    logits = torch.randn(rows, vocabulary) * 3
    compared = 0
    expected = [reference_probabilities(row.tolist(), sampling) for row in logits]
    for number in (0.0, 0.013, 0.25, 0.5, 0.77, 0.99, 1 - 2**-53):
        drawn = draw_tokens(logits.clone(), torch.full((rows,), number, dtype=torch.float64), sampling).tolist()
        for row, token in enumerate(drawn):
            assert expected[row][token] > 0
            wanted, distance = inverse(expected[row], number)
            # Closer to a step than float32 tells apart, the neighbour is as right.
            if distance > 1e-6:
                assert token == wanted
                compared += 1
    assert compared >= 5 * rows


def test_draw_by_hand():
    """Probabilities 0, 1/2, 1/4, 1/4: cumulative 0, 1/2, 3/4, 1; token 0 is impossible even for u = 0."""
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.25, 0.25]])).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.99999], dtype=torch.float64)
    assert draw_tokens(logits, uniforms, SamplingConfig()).tolist() == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 40, "top_p": 0.8}])
def test_tokens_do_not_depend_on_how_many_rows_are_processed_together(monkeypatch, settings):
    """Nor on the precision that the same numbers are stored in."""
    torch.manual_seed(5)
    logits = (torch.randn(7, 600) * 3).bfloat16()
    uniforms, sampling = torch.rand(7, dtype=torch.float64), SamplingConfig(**settings)
    together = draw_tokens(logits.float(), uniforms, sampling).tolist()
    logprobs = token_logprobs(logits.float(), torch.tensor(together))
    for numbers in (1, 600, 1800):  # one row at once, one, three
        monkeypatch.setattr("spin.alignment.generation.transformers.sampling._CACHED_NUMBERS", numbers)
        assert draw_tokens(logits, uniforms, sampling).tolist() == together
        torch.testing.assert_close(token_logprobs(logits, torch.tensor(together)), logprobs)


def test_ties_at_a_cut_off_are_kept_whole():
    """Three tokens share the place of the second likeliest: all of them can be drawn, the others cannot."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]]).repeat(1000, 1)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        drawn = draw_tokens(logits, uniforms, SamplingConfig(**settings))
        assert set(drawn.tolist()) == {1, 2, 3, 4}, settings


def test_a_large_vocabulary_is_drawn_as_its_softmax_says():
    """Chi-square over 40 groups of equal probability: 39 degrees of freedom, below 80 in all but 1 of 10,000 seeds."""
    torch.manual_seed(3)
    count, groups = 8000, 40
    logits = torch.randn(1, 32_000) * 2
    cumulative = logits[0].double().softmax(0).cumsum(0)
    uniforms = torch.rand(count, dtype=torch.float64)
    drawn = torch.cat([draw_tokens(logits.repeat(500, 1), part, SamplingConfig()) for part in uniforms.split(500)])
    group = ((cumulative - logits[0].double().softmax(0) / 2) * groups).long().clamp(max=groups - 1)
    expected = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, logits[0].double().softmax(0)) * count
    observed = torch.bincount(group[drawn], minlength=groups)
    assert float(((observed - expected) ** 2 / expected).sum()) < 80


def test_greedy_is_the_argmax_and_faulty_logits_are_told():
    logits = torch.tensor(
        [[1.0, 3.0, 2.0], [1.0, float("nan"), 2.0], [float("inf"), 0.0, 0.0], [4.0, float("-inf"), 0.0]]
    )
    greedy = SamplingConfig(temperature=0.0)
    assert draw_tokens(logits, None, greedy).tolist() == [1, NOT_FINITE, NOT_FINITE, 0]
    uniforms = torch.full((4,), 1e-9, dtype=torch.float64)
    assert draw_tokens(logits, uniforms, SamplingConfig()).tolist() == [0, NOT_FINITE, NOT_FINITE, 0]


def test_repetition_penalty_by_hand():
    """Seen tokens: 3 / 1.5 = 2 above 0, -2 * 1.5 = -3 below; the rest stays."""
    logits, seen = torch.tensor([[3.0, -2.0, 3.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 1.5).tolist() == [[2.0, -3.0, 3.0, -2.0]]


def test_logprobs_by_hand():
    """Softmax of log(1), log(3) is 1/4, 3/4."""
    logits = torch.log(torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
    found = token_logprobs(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.log(torch.tensor([0.25, 0.75])))
