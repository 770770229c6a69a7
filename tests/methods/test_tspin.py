"""T-SPIN against arithmetic worked by hand, in float64."""

import math

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LOSSES, LossInputs, find_loss
from spin.alignment.methods.losses.settings import loss_arguments


def doubles(*values):
    return torch.tensor(values, dtype=torch.double)


def triplet(weights=None, mask=None):
    """One row, two tokens a response: log-probs -3 (chosen), -4 (rejected), -6 (initial); no reference."""
    policy = doubles([-1.0, -2.0], [-3.0, -1.0], [-2.0, -4.0])
    mask = torch.ones(3, 2) if mask is None else mask
    return LossInputs(policy, None, mask, weights, responses=("chosen", "rejected", "initial"))


def test_both_advantages_by_hand():
    # beta 0.5: current 0.5 * (-3 + 4) = 0.5, historical 0.5 * (-4 + 6) = 1: log(1 + e^-0.5) + log(1 + e^-1)
    found = LOSSES["tspin"](triplet(), beta=0.5)
    assert found.losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1))], rel=1e-12)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == (-1.5, -2.0)


def test_the_historical_weight_scales_the_second_term_alone():
    # log(1 + e^-0.5) + 3 log(1 + e^-1); weight 0 is a reference-free SPIN
    for weight in (3.0, 0.0):
        found = LOSSES["tspin"](triplet(), beta=0.5, historical_weight=weight).losses.item()
        assert found == pytest.approx(math.log1p(math.exp(-0.5)) + weight * math.log1p(math.exp(-1)), rel=1e-12)


def test_lengths_and_weights():
    # one rejected token: means -1.5, -3, -3: current 1.5, historical 0
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    found = LOSSES["tspin"](triplet(mask=mask), beta=1.0, length_normalize=True).losses.item()
    assert found == pytest.approx(math.log1p(math.exp(-1.5)) + math.log(2), rel=1e-12)
    # weights 2 0 | 1 1 | 0 1: sums -2, -4, -4
    found = LOSSES["tspin"](triplet(weights=doubles([2, 0], [1, 1], [0, 1])), beta=1.0).losses.item()
    assert found == pytest.approx(math.log1p(math.exp(-2.0)) + math.log(2), rel=1e-12)


def test_the_rejected_response_is_pulled_both_ways():
    # d/dr at equal rewards: chosen -1/2, rejected +1/2 - 1/2, initial +1/2, each times beta
    policy = torch.zeros(3, 2, dtype=torch.double, requires_grad=True)
    inputs = LossInputs(policy, None, torch.ones(3, 2), responses=("chosen", "rejected", "initial"))
    LOSSES["tspin"](inputs, beta=0.1).losses.sum().backward()
    assert policy.grad[:, 0].tolist() == pytest.approx([-0.05, 0.0, 0.05], abs=1e-12)


def test_its_own_setting_is_read_and_checked():
    shared = {"beta": 0.1, "length_normalize": False, "alpha": 0.0}
    assert loss_arguments("tspin", shared, {"historical_weight": 2}) == {
        "beta": 0.1,
        "length_normalize": False,
        "historical_weight": 2.0,
    }
    assert not find_loss("tspin").needs_reference
    for own, sentence in (
        ({"historic_weight": 1}, "does not take: it takes historical_weight; did you mean 'historical_weight'"),
        ({"historical_weight": -1}, "'historical_weight' in loss_settings is -1.0: set it to 0 or more"),
        ({"historical_weight": "much"}, "'historical_weight' in loss_settings is 'much', which is not a number"),
        ({"beta": 1}, "'beta', which is a key of its own: write beta: 1 next to loss_type"),
    ):
        with pytest.raises(InputError, match=sentence):
            loss_arguments("tspin", shared, own)
    with pytest.raises(
        InputError, match="'weight', which loss_type sigmoid does not take: it has no settings of its own"
    ):
        loss_arguments(
            "sigmoid", {"beta": 0.1, "label_smoothing": 0.0, "length_normalize": False, "alpha": 0.0}, {"weight": 1}
        )
