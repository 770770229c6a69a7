"""The importance of responses that other weights have sampled: ratios, divergences and weights, against plain arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from spin.alignment.methods.losses import LOSSES, LossInputs, LossOutputs
from spin.alignment.training.importance import Importance

ALONE = SimpleNamespace(
    device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor, gather=lambda tensor: tensor
)
NAN = math.nan
# Two pairs: chosen, chosen, rejected, rejected. The second chosen response is the ground truth.
POLICY = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, 0.0], [-0.5, -0.5]])
SAMPLER = torch.tensor([[-1.5, -1.75], [NAN, 0.0], [-2.0, 0.0], [-0.5, -0.625]])
MASK = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]], dtype=torch.bool)
INPUTS = LossInputs(POLICY, POLICY, MASK, sampler_logps=SAMPLER)
# log pi - log mu of the sampled tokens, and of the three sampled responses.
TOKENS = [0.5, -0.25, -1.0, 0.0, 0.125]
RESPONSES = [0.25, -1.0, 0.125]


def test_ratios_are_of_responses_and_divergences_of_tokens():
    importance = Importance(None)
    importance.add(INPUTS, 2)
    found = importance.take(ALONE)
    assert found == pytest.approx(
        {
            "importance/mean": sum(map(math.exp, RESPONSES)) / 3,
            "importance/max": math.exp(0.25),
            "importance/kl": sum(math.expm1(d) - d for d in TOKENS) / 5,
            "importance/kl_k1": -sum(TOKENS) / 5,
        }
    )
    assert importance.take(ALONE) == {}


def test_the_estimates_are_those_of_the_divergence():
    """Over all tokens of a vocabulary, weighted by their probability under the sampler, both are KL(sampler || policy)."""
    sampler, policy = (torch.randn(6, generator=torch.Generator().manual_seed(n)).log_softmax(0) for n in (1, 2))
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(3))
    streams = (values[drawn].reshape(2, -1) for values in (policy, sampler))
    policy_logps, sampler_logps = streams
    importance = Importance(None)
    mask = torch.ones_like(policy_logps, dtype=torch.bool)
    importance.add(LossInputs(policy_logps, None, mask, sampler_logps=sampler_logps), 1)
    found = importance.take(ALONE)
    divergence = (sampler.exp() * (sampler - policy)).sum().item()
    assert found["importance/kl"] == pytest.approx(divergence, rel=0.02)
    assert found["importance/kl_k1"] == pytest.approx(divergence, rel=0.02)
    assert math.isfinite(found["importance/max"])  # of 100,000 tokens


def test_the_loss_of_a_pair_has_the_ratio_of_both_responses_up_to_the_cap():
    rewards = torch.zeros(2)
    weighted = Importance(1.05).correct(INPUTS, LossOutputs(torch.tensor([2.0, 3.0]), rewards, rewards))
    assert weighted.losses.tolist() == pytest.approx([2 * math.exp(0.25 - 1.0), 3 * 1.05])
    each = Importance(1.2).correct(INPUTS, LossOutputs(torch.tensor([2.0, 3.0, 4.0, 5.0]), rewards, rewards))
    assert each.losses.tolist() == pytest.approx([2 * 1.2, 3, 4 * math.exp(-1), 5 * math.exp(0.125)])
    importance = Importance(1.2)
    importance.add(INPUTS, 4)
    assert importance.take(ALONE)["importance/clipped"] == 1 / 4
    importance.add(INPUTS, 2)
    assert importance.take(ALONE)["importance/clipped"] == 0


def test_weights_are_constants():
    """The gradient is the weight times that of the plain loss."""
    policy = POLICY.clone().requires_grad_()
    inputs = LossInputs(policy, POLICY, MASK, sampler_logps=SAMPLER)
    outputs = LOSSES["sigmoid"](inputs)
    (plain,) = torch.autograd.grad(outputs.losses.sum(), policy, retain_graph=True)
    (weighted,) = torch.autograd.grad(Importance(1.05).correct(inputs, outputs).losses.sum(), policy)
    weights = torch.tensor([math.exp(-0.75), 1.05] * 2)[:, None]
    assert torch.allclose(weighted, plain * weights) and plain.abs().sum() > 0


def test_without_a_cap_or_log_probs_nothing_changes():
    outputs = LOSSES["sigmoid"](INPUTS)
    assert Importance(None).correct(INPUTS, outputs) is outputs
    assert Importance(2.0).correct(LossInputs(POLICY, POLICY, MASK), outputs) is outputs
