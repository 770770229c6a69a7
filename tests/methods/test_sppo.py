"""SPPO, SPACE and the weighted KL term against arithmetic worked by hand, in float64."""

import math
import re

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LOSSES, LossInputs, LossOutputs, soft_mean
from spin.alignment.methods.losses.settings import loss_arguments
from spin.alignment.methods.pairings import PAIRINGS, check_num_samples
from spin.alignment.pairs.annotate import check_loss
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.training.objective import per_pair
from spin.alignment.training.settings import read_settings
from spin.alignment.training.trainer import SPINConfig


def doubles(*values):
    return torch.tensor(values, dtype=torch.double)


def streams(weights=None, position_kl=None, **labels):
    """One pair, two tokens a side: log-ratios +0.5 +0.25 (chosen) and -0.5 +0.25 (rejected): r_w = 0.75, r_l = -0.25."""
    policy = doubles([-1.0, -2.0], [-3.0, -1.0])
    reference = doubles([-1.5, -2.25], [-2.5, -1.25])
    return LossInputs(policy, reference, torch.ones(2, 2), weights, position_kl, labels)


def gradients(name, policy=None, **labels):
    """Gradient of each response's first token at the start, where policy and opponent are the same."""
    policy = torch.zeros(2, 3, dtype=torch.double, requires_grad=True)
    inputs = LossInputs(policy, torch.zeros(2, 3), torch.ones(2, 3), labels=labels)
    LOSSES[name](inputs, beta=0.1).losses.sum().backward()
    return policy.grad[:, 0].tolist()


def test_sppo_by_hand():
    # arXiv 2405.00675, eq. 3.6; eta = 1 / 0.5 = 2: 1/2 [(0.75 - 2 * 0.3)^2 + (-0.25 - 2 * -0.1)^2] = (0.0225 + 0.0025) / 2
    found = LOSSES["sppo"](streams(win_prob=doubles(0.8, 0.4)), beta=0.5)
    assert found.losses.item() == pytest.approx(0.0125, rel=1e-12)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == (0.375, -0.125)


def test_eta_overrides_beta():
    # eta = 1: 1/2 [(0.75 - 0.3)^2 + (-0.25 + 0.1)^2] = (0.2025 + 0.0225) / 2
    found = LOSSES["sppo"](streams(win_prob=doubles(0.8, 0.4)), beta=0.5, eta=1.0)
    assert found.losses.item() == pytest.approx(0.1125, rel=1e-12)


def test_sppo_single_takes_one_probability_for_both():
    # targets +-2 * (0.8 - 1/2) = +-0.6, whatever the rejected half holds: 1/2 [0.15^2 + 0.35^2] = (0.0225 + 0.1225) / 2
    for rejected in (0.2, 0.9):
        found = LOSSES["sppo_single"](streams(pair_win_prob=doubles(0.8, rejected)), beta=0.5)
        assert found.losses.item() == pytest.approx(0.0725, rel=1e-12)


def test_sppo_hard_is_sppo_of_a_sure_win():
    # targets +-eta/2 = +-1: 1/2 [(0.75 - 1)^2 + (-0.25 + 1)^2] = (0.0625 + 0.5625) / 2
    hard = LOSSES["sppo_hard"](streams(), beta=0.5).losses
    assert hard.item() == pytest.approx(0.3125, rel=1e-12)
    assert torch.equal(hard, LOSSES["sppo"](streams(win_prob=doubles(1.0, 0.0)), beta=0.5).losses)


def test_sppo_reward_costs_each_response_on_its_own():
    # eta = 1: (0.75 - 0.5)^2 = 0.0625 and (-0.25 + 1)^2 = 0.5625; eta = 2: (0.75 - 1)^2 and (-0.25 + 2)^2
    inputs = streams(reward=doubles(0.5, -1.0))
    assert LOSSES["sppo_reward"](inputs, beta=0.1).losses.tolist() == pytest.approx([0.0625, 0.5625], rel=1e-12)
    assert LOSSES["sppo_reward"](inputs, eta=2.0).losses.tolist() == pytest.approx([0.0625, 3.0625], rel=1e-12)


def test_sppo_of_two_pairs_keeps_the_halves_apart():
    same = torch.zeros(4, 3, dtype=torch.double)
    inputs = LossInputs(
        same, same, torch.ones(4, 3), labels={"win_prob": doubles(0.5, 1.0, 0.5, 0.0), "reward": doubles(1, 2, 3, 4)}
    )
    assert LOSSES["sppo"](inputs, eta=2.0).losses.tolist() == [0.0, 1.0]  # 1/2 (1^2 + 1^2) for the second
    assert LOSSES["sppo_reward"](inputs).losses.tolist() == [1.0, 4.0, 9.0, 16.0]


def test_sppo_weighs_tokens():
    # weights 2 0 | 1 4: r_w = 2 * 0.5 = 1, r_l = -0.5 + 4 * 0.25 = 0.5; targets +-1: 1/2 [0 + 1.5^2]
    found = LOSSES["sppo_hard"](streams(weights=doubles([2, 0], [1, 4])), beta=0.5)
    assert found.losses.item() == pytest.approx(1.125, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        # d/dr of 1/2 (r - t)^2 at 0 is -t, with t = 10 * (P - 1/2)
        ("sppo", {"win_prob": doubles(0.8, 0.4)}, [-3.0, 1.0]),
        ("sppo", {"win_prob": doubles(0.8, 0.7)}, [-3.0, -2.0]),  # a good loser is pushed up too
        ("sppo_single", {"pair_win_prob": doubles(0.8, 0.2)}, [-3.0, 3.0]),
        ("sppo_hard", {}, [-5.0, 5.0]),
        # d/dr (r - reward)^2 at 0 is -2 reward
        ("sppo_reward", {"reward": doubles(0.5, -1.0)}, [-1.0, 2.0]),
        # d/dr of -log sigmoid(r) and -log sigmoid(-r) at 0
        ("space", {}, [-0.5, 0.5]),
    ],
)
def test_the_gradient_at_the_start(name, labels, expected):
    assert gradients(name, **labels) == pytest.approx(expected, rel=1e-12)


def test_space_by_hand():
    # arXiv 2512.07175, L_Space: -log sigma_mu(r_w) - mu log sigma_{1/mu}(-r_l), sigma_mu(r) = 1 / (1 + mu exp(-r))
    for mu in (1.0, 3.0):
        by_hand = math.log1p(mu * math.exp(-0.75)) + mu * math.log1p(math.exp(-0.25) / mu)
        assert LOSSES["space"](streams(), noise_ratio=mu).losses.item() == pytest.approx(by_hand, rel=1e-12)


def test_space_cares_for_each_response_where_the_margin_is_the_same():
    higher = streams()
    higher.policy_logps.add_(0.5)  # every log-ratio rises by 0.5 a token: the margin stays 1
    losses = [
        LOSSES[name](inputs, beta=1.0).losses.item() for name in ("sigmoid", "space") for inputs in (streams(), higher)
    ]
    assert losses[0] == pytest.approx(losses[1]) and abs(losses[2] - losses[3]) > 0.1


def test_soft_mean_by_hand():
    rewards = doubles([0.0, math.log(3)], [2.0, 2.0])
    # (1/1) log((1 + 3) / 2) = log 2; equal rewards are their own mean
    assert soft_mean(rewards).tolist() == pytest.approx([math.log(2), 2.0], rel=1e-12)
    # (1/2) log((1 + 9) / 2)
    assert soft_mean(rewards[0], b=2.0).item() == pytest.approx(math.log(5) / 2, rel=1e-12)
    assert soft_mean(rewards, dim=0).tolist() == pytest.approx(
        [math.log((1 + math.exp(2)) / 2), math.log((3 + math.exp(2)) / 2)]
    )


def test_soft_mean_lies_between_mean_and_maximum():
    rewards = doubles(0.0, 1.0)
    assert soft_mean(rewards, b=0.0).item() == 0.5
    assert soft_mean(rewards, b=1e-6).item() == pytest.approx(0.5, abs=1e-6)
    assert soft_mean(rewards, b=1000.0).item() == pytest.approx(1.0, abs=1e-3)  # no overflow


@pytest.mark.parametrize(
    ("name", "label"), [("sppo", "win_prob"), ("sppo_single", "pair_win_prob"), ("sppo_reward", "reward")]
)
def test_a_loss_without_its_labels_is_refused(name, label):
    assert [item.name for item in LOSSES[name].labels] == [label]
    with pytest.raises(ValueError, match=f"the loss reads the label {label}, which these inputs do not have"):
        LOSSES[name](streams())


def test_the_kl_term_lowers_the_margin():
    # TIS-DPO (arXiv 2410.04350): margin 1 - 0.5 * ((0.2 + 0.4) - (0.1 + 0.1)) = 0.8
    kl = doubles([0.2, 0.4], [0.1, 0.1])
    settings = {"beta": 2.0, "alpha": 0.5}
    assert LOSSES["sigmoid"](streams(position_kl=kl), **settings).losses.item() == pytest.approx(
        math.log1p(math.exp(-1.6))
    )
    assert LOSSES["hinge"](streams(position_kl=kl), beta=0.5, alpha=0.5).losses.item() == pytest.approx(0.6)
    assert LOSSES["ipo"](streams(position_kl=kl), beta=0.5, alpha=0.5).losses.item() == pytest.approx(0.04)
    # weights 2 0 | 1 4: margin 1 - 0.5, KL 2 * 0.2 - (0.1 + 0.4) = -0.1
    weighted = streams(position_kl=kl, weights=doubles([2, 0], [1, 4]))
    assert LOSSES["ipo"](weighted, beta=0.5, alpha=0.5).losses.item() == pytest.approx((0.5 + 0.05 - 1) ** 2)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_alpha_without_position_kl_is_refused(name):
    with pytest.raises(ValueError, match=r"alpha is 0\.5, but these inputs have no position_kl"):
        LOSSES[name](streams(), alpha=0.5)


def test_padding_of_the_kl_never_counts():
    inputs = LossInputs(
        torch.zeros(2, 2),
        torch.zeros(2, 2),
        torch.tensor([[1, 0], [1, 1]]),
        position_kl=torch.tensor([[1.0, math.nan], [1.0, 0]]),
    )
    assert LOSSES["sigmoid"](inputs, alpha=1.0).losses.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        (
            "sigmoid",
            {"eta": 1000.0},
            "eta is 1000.0, but loss_type sigmoid does not use it: remove it or choose sppo, ",
        ),
        ("sppo", {"alpha": 0.5}, "alpha is 0.5, but loss_type sppo does not use it"),
        ("sppo", {"label_smoothing": 0.1}, "label_smoothing is 0.1, but loss_type sppo does not use it"),
        ("sigmoid", {"noise_ratio": 3.0}, "noise_ratio is 3.0, but loss_type sigmoid does not use it: .* choose space"),
    ],
)
def test_settings_of_another_loss_are_refused(name, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        loss_arguments(name, settings)


def test_defaults_of_another_loss_pass():
    settings = {"beta": 0.1, "eta": None, "alpha": 0.0, "noise_ratio": 1.0, "label_smoothing": 0.0}
    assert loss_arguments("sppo", settings) == {"beta": 0.1, "eta": None}
    assert loss_arguments("space", settings) == {"beta": 0.1, "noise_ratio": 1.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss_type": "sppo", "eta": 0.0}, "eta is 0.0: set it to a number above 0"),
        ({"loss_type": "space", "noise_ratio": -1.0}, "noise_ratio is -1.0: set it to a number above 0"),
        ({"alpha": -0.5}, "alpha is -0.5: set it to 0 or more"),
        (
            {"loss_type": "sppo", "length_normalize": True},
            "length_normalize is True, but loss_type sppo does not use it",
        ),
    ],
)
def test_training_settings_are_checked(settings, sentence, tmp_path):
    with pytest.raises(InputError, match=re.escape(sentence)):
        SPINConfig(output_dir=str(tmp_path), **settings)


def test_training_settings_reach_the_loss(tmp_path):
    config = SPINConfig(output_dir=str(tmp_path), loss_type="sppo", beta=0.001)
    assert config.loss_arguments == {"beta": 0.001, "eta": None}


def test_a_pair_costs_the_mean_of_its_responses():
    two = LossOutputs(doubles(1, 2, 3, 6), doubles(0, 0), doubles(0, 0))
    assert per_pair(two).tolist() == [2.0, 4.0]
    assert per_pair(LossOutputs(doubles(1, 2), doubles(0, 0), doubles(0, 0))).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["sppo_mistral_7b", "sppo_llama3_8b", "sppo_gemma2_9b"])
def test_the_configurations_of_the_paper_fit_together(name, tmp_path):
    """Everything that can be checked without the models: sections, flags, settings, and pairing against loss and samples."""
    config = load_run_config(f"configs/{name}.yaml", [])
    convert, sampling = config.convert_config(0), config.generate_config(0)
    check_num_samples(convert.pairing, PAIRINGS[convert.pairing], sampling.num_samples)
    for iteration in range(config.iterations):
        here = {"model_name_or_path": "opponent", "output_dir": str(tmp_path), "use_cpu": True}
        settings = read_settings(config.train_values(iteration) | here, name, SPINConfig).arguments
        check_loss(convert.pairing, settings.loss_type)
        assert (settings.loss_arguments["beta"], settings.learning_rate, settings.num_train_epochs) == (0.001, 5e-7, 1)
        assert settings.pairs_per_micro_batch * config.launch.num_processes == 64
        assert config.data.played(iteration)[0].endswith(f"sppo-iter{iteration + 1}")
    assert (sampling.num_samples, sampling.temperature, sampling.top_p, config.iterations) == (5, 0.7, 0.9, 3)


@pytest.mark.parametrize(
    ("pairing", "loss_type", "sentence"),
    [
        (
            "best_vs_worst",
            "sppo",
            "loss_type sppo reads win_probs, which pairing best_vs_worst does not write: set pairing: win_rate",
        ),
        ("ground_truth", "sppo_reward", "which pairing ground_truth does not write: set pairing: every_sample"),
        ("every_sample", "sigmoid", "pairing every_sample prefers no response, but loss_type sigmoid compares two"),
    ],
)
def test_a_pairing_and_a_loss_that_do_not_fit(pairing, loss_type, sentence):
    with pytest.raises(InputError, match=sentence):
        check_loss(pairing, loss_type)


@pytest.mark.parametrize(
    ("pairing", "loss_type"), [("win_rate", "sppo_single"), ("win_rate", "sigmoid"), ("ground_truth", "space")]
)
def test_a_pairing_and_a_loss_that_fit(pairing, loss_type):
    check_loss(pairing, loss_type)
