"""PairForward: the same log-probs packed and padded, and a model that is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spin.alignment.logprobs.pair_forward import PairForward, compute_dtype
from tests.helpers import tiny_llama
from tests.logprobs.test_packed_rows import VOCAB, random_pairs


@pytest.fixture
def forward() -> PairForward:
    return PairForward.of(tiny_llama(VOCAB), 0, torch.device("cpu"), torch.float32, pairs_per_batch=2)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_packed_rows_give_the_log_probs_of_padded_ones(forward, share_prompts):
    pairs = random_pairs(5)
    with forward.evaluation():
        expected = forward.logps(pairs)
    packed = forward.packed(1000, "sdpa", share_prompts)
    assert (forward.kernel, packed.kernel) == (None, "sdpa")
    assert packed.tokens(pairs[0]) - forward.tokens(pairs[0]) == (0 if share_prompts else len(pairs[0]["prompt_ids"]))
    with packed.evaluation():
        found, padded = packed.logps(pairs), packed.padded_logps(pairs)
        again = packed.logps(pairs)  # padded rows have left the packed attention in place
    assert [len(logps) for logps in found] == [
        len(pair[f"{side}_ids"]) for side in ("chosen", "rejected") for pair in pairs
    ]
    for one, two, three, four in zip(found, padded, expected, again, strict=True):
        assert torch.allclose(one, three, atol=1e-5) and torch.allclose(two, three, atol=1e-6)
        assert torch.equal(one, four)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_ends_in_the_mode_it_began_in(forward, training):
    forward.model.train(training)
    with pytest.raises(KeyboardInterrupt), forward.evaluation():
        assert not forward.model.training and not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert forward.model.training is training and torch.is_grad_enabled()


def test_log_probs_are_computed_in_the_given_precision(forward):
    pairs = random_pairs(2)
    half = replace(forward, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    exact, rounded = forward.logps(pairs), half.logps(pairs)
    difference = max((one - two).abs().max().item() for one, two in zip(exact, rounded, strict=True))
    assert 0 < difference < 0.1 and rounded[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("mixed_precision", "expected"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float64), (None, torch.float64)],
)
def test_the_precision_of_products_is_that_of_mixed_precision_else_of_the_weights(mixed_precision, expected):
    assert compute_dtype(torch.nn.Linear(2, 2).double(), mixed_precision) == expected


def test_an_evaluation_converts_the_weights_once(forward):
    pairs = random_pairs(2)
    half = replace(forward, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    layer = half.model.model.layers[0].mlp.down_proj
    with half.evaluation():
        before = half.logps(pairs)
        layer.weight.data.zero_()  # seen only once the 16-bit copies are made again
        assert all(map(torch.equal, before, half.logps(pairs)))
    assert not all(map(torch.equal, before, half.logps(pairs)))
