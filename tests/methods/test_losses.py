"""Losses against arithmetic worked by hand, in float64."""

import math

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LOSSES, LossInputs
from spin.alignment.methods.losses.base import sequence_logratios
from spin.alignment.methods.losses.settings import loss_arguments


def streams(weights=None, mask=None):
    """One pair, two tokens a side: log-ratios +0.5 +0.25 (chosen) and -0.5 +0.25 (rejected), margin 0.75 - (-0.25) = 1.0."""
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], dtype=torch.double)
    reference = torch.tensor([[-1.5, -2.25], [-2.5, -1.25]], dtype=torch.double)
    mask = torch.ones(2, 2) if mask is None else mask
    return LossInputs(policy, reference, mask, weights)


@pytest.mark.parametrize("name, at_zero", [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_first_loss_is_that_of_a_zero_margin(name, at_zero):
    same = torch.randn(6, 4)
    outputs = LOSSES[name](LossInputs(same, same, torch.ones(6, 4)), beta=0.1)
    assert outputs.losses.tolist() == pytest.approx([at_zero] * 3, abs=1e-12)
    assert outputs.chosen_rewards.tolist() == [0.0] * 3


def test_sigmoid_by_hand():
    # beta 2, margin 1: -log sigmoid(2) = log(1 + e^-2) = 0.126928
    outputs = LOSSES["sigmoid"](streams(), beta=2.0)
    assert outputs.losses.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)
    # rewards are beta times the summed log-ratios: 2 * 0.75 and 2 * -0.25
    assert (outputs.chosen_rewards.item(), outputs.rejected_rewards.item()) == pytest.approx((1.5, -0.5))


def test_label_smoothing_mixes_both_directions():
    # 0.9 * log(1 + e^-2) + 0.1 * log(1 + e^2) = 0.114235 + 0.212693
    outputs = LOSSES["sigmoid"](streams(), beta=2.0, label_smoothing=0.1)
    assert outputs.losses.item() == pytest.approx(0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)))


def test_hinge_by_hand():
    assert LOSSES["hinge"](streams(), beta=0.1).losses.item() == pytest.approx(0.9)  # 1 - 0.1 * 1
    assert LOSSES["hinge"](streams(), beta=2.0).losses.item() == 0.0  # 1 - 2 * 1 < 0


def test_ipo_by_hand():
    assert LOSSES["ipo"](streams(), beta=0.25).losses.item() == pytest.approx(1.0)  # (1 - 1/0.5)^2


def test_length_normalisation_divides_by_completion_tokens():
    # chosen 0.75 / 2 = 0.375; rejected has one token: -0.5 / 1
    mask = torch.tensor([[1, 1], [1, 0]])
    chosen, rejected = sequence_logratios(streams(mask=mask), length_normalize=True)
    assert (chosen.item(), rejected.item()) == (0.375, -0.5)


def test_weights_scale_tokens_and_uniform_weights_change_nothing():
    # chosen 2 * 0.5 + 0 * 0.25 = 1.0; rejected 1 * -0.5 + 4 * 0.25 = 0.5
    chosen, rejected = sequence_logratios(streams(weights=torch.tensor([[2.0, 0.0], [1.0, 4.0]])))
    assert (chosen.item(), rejected.item()) == (1.0, 0.5)
    plain, uniform = (LOSSES["sigmoid"](streams(weights=w), beta=0.1).losses for w in (None, torch.ones(2, 2)))
    assert torch.equal(plain, uniform)


def test_padding_never_counts_even_when_it_is_not_finite():
    inputs = streams(mask=torch.tensor([[1, 0], [1, 1]]))
    inputs.policy_logps[0, 1] = float("nan")
    assert sequence_logratios(inputs)[0].item() == 0.5


def test_long_sums_do_not_cancel():
    # Two sums near -2500 nats in float32 differ by 1e-4; the per-token differences are summed in float64.
    reference = torch.full((2, 1000), -2.5)
    policy = reference.clone()
    policy[0] += 2.0**-20
    chosen, _ = sequence_logratios(LossInputs(policy, reference, torch.ones(2, 1000)))
    exact = (policy[0].double() - reference[0].double()).sum()
    assert chosen.item() == exact.item() != 0.0


def test_the_gradient_pushes_chosen_up_and_rejected_down():
    policy = torch.zeros(2, 3, dtype=torch.double, requires_grad=True)
    LOSSES["sigmoid"](LossInputs(policy, torch.zeros(2, 3), torch.ones(2, 3)), beta=0.1).losses.sum().backward()
    # d/dm -log sigmoid(beta m) at 0 = -beta / 2
    assert torch.allclose(policy.grad, torch.tensor([[-0.05] * 3, [0.05] * 3], dtype=torch.double))


def test_an_unknown_loss_lists_the_valid_ones():
    with pytest.raises(InputError, match="choose one of hinge, ipo, sigmoid, space, sppo"):
        loss_arguments("dpo", {})


def test_a_setting_the_loss_would_ignore_is_refused():
    with pytest.raises(InputError, match="loss_type hinge does not use it"):
        loss_arguments("hinge", {"beta": 0.1, "label_smoothing": 0.1})
    assert loss_arguments("hinge", {"beta": 0.1, "label_smoothing": 0.0}) == {"beta": 0.1}
