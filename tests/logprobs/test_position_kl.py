"""The weighted sequence-KL term against a naive float64 computation, packed and padded; what refuses it."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import batch_loss, install_packed_forward, reference_pass, use_attention
from spin.alignment.logprobs.head import LogitTransform
from spin.alignment.logprobs.position_kl import position_kl
from spin.alignment.methods.losses import LOSSES
from spin.alignment.models.adapters import add_adapters
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.batching import check_head
from spin.alignment.training.moving_reference import check_can_exchange
from tests.logprobs.test_packed_rows import VOCAB, random_pairs, tiny
from tests.training.test_packed_training import run

ALPHA, BETA = 0.5, 0.3


def test_kl_by_hand():
    # pi = (1/2, 1/2), pi_ref = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3) = 0.143841
    ours, theirs = (torch.tensor([row], dtype=torch.double) for row in ([0.0, 0.0], [0.0, math.log(3)]))
    assert position_kl(ours, theirs).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    assert position_kl(theirs, theirs).item() == 0.0
    # a soft cap: 2 tanh(l / 2) is applied to both
    capped = position_kl(ours, theirs, LogitTransform(softcap=2.0))
    assert capped.item() == pytest.approx(position_kl(ours, 2 * torch.tanh(theirs / 2)).item(), rel=1e-12)


def two_models(architecture: str = "llama"):
    """A policy and an opponent that differ, in float64."""
    policy = tiny(architecture).double()
    if architecture == "llama":
        use_attention(policy, "sdpa")  # eager attention takes its softmax in float32
    opponent = copy.deepcopy(policy).eval()
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            torch.manual_seed(number)
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy, opponent


def naive(policy, opponent, pairs):
    """The loss of all pairs, one sequence at a time: TIS-DPO's margin with the weighted sequence KL taken off."""
    total = 0.0
    for pair in pairs:
        terms = {}
        for half in ("chosen", "rejected"):
            prompt, ids = pair["prompt_ids"], pair[f"{half}_ids"]
            weights, reference = (torch.tensor(pair[f"{half}_{name}"]).double() for name in ("weights", "reference"))
            rows = torch.tensor([prompt + ids])
            ours, theirs = (
                torch.log_softmax(model(rows).logits[0, len(prompt) - 1 : -1], dim=-1) for model in (policy, opponent)
            )
            ratios = ours[range(len(ids)), ids] - reference
            kl = (ours.exp() * (ours - theirs.detach())).sum(dim=-1)
            terms[half] = ((weights * ratios).sum(), (weights * kl).sum())
        (chosen, chosen_kl), (rejected, rejected_kl) = terms["chosen"], terms["rejected"]
        margin = chosen - rejected - ALPHA * (chosen_kl - rejected_kl)
        total = total - torch.nn.functional.logsigmoid(BETA * margin)
    return total


def farthest(model, gradients):
    """The largest distance of a gradient's entry from the expected one, relative to the largest entry of its parameter."""
    pairs = zip(model.parameters(), gradients, strict=True)
    return max(((ours.grad - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def objective(inputs):
    return LOSSES["sigmoid"](inputs, beta=BETA, alpha=ALPHA).losses.sum()


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize(("architecture", "tolerance"), [("llama", 1e-11), ("gemma2", 3e-6)])
def test_packed_rows_give_the_naive_loss_and_gradient(architecture, tolerance, share_prompts):
    policy, opponent = two_models(architecture)
    pairs = random_pairs(7, weights=True)
    expected = naive(policy, opponent, pairs)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    for model in (policy, opponent):
        install_packed_forward(model, fused_head=False)
    batch = PackedCollator("sdpa", 2**24, share_prompts)(pairs)
    assert len(batch.groups) > 1
    reference = reference_pass(opponent, batch, torch.float64)
    loss = batch_loss(policy, batch, objective, reference)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert farthest(policy, gradients) < max(1e-6, 10 * tolerance)
    with torch.no_grad():
        assert batch_loss(policy, batch, objective, reference).item() == pytest.approx(loss.item(), rel=1e-12)
    assert all(parameter.grad is None for parameter in opponent.parameters())


def test_padded_rows_give_the_naive_loss_and_gradient():
    policy, opponent = two_models()
    pairs = random_pairs(5, weights=True)
    expected = naive(policy, opponent, pairs)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    batch = PairCollator(0)(pairs)
    loss = batch_loss(policy, batch, objective, reference_pass(opponent, batch, torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # padded log-probs are float32
    assert farthest(policy, gradients) < 3e-5


def test_the_kl_itself_is_exact_packed_and_padded():
    """In float64, token by token, where the loss above also holds float32 streams."""
    policy, opponent = two_models()
    pairs = random_pairs(4, weights=True)
    found = []

    def keep(inputs):
        found.append(inputs.position_kl[inputs.completion_mask.bool()])
        return objective(inputs)

    with torch.no_grad():
        padded = PairCollator(0)(pairs)
        batch_loss(policy, padded, keep, reference_pass(opponent, padded, torch.float64))
        logits = [
            [
                torch.log_softmax(model(torch.tensor([pair["prompt_ids"] + pair[f"{half}_ids"]])).logits[0], dim=-1)[
                    len(pair["prompt_ids"]) - 1 : -1
                ]
                for model in (policy, opponent)
            ]
            for half in ("chosen", "rejected")
            for pair in pairs
        ]
        expected = torch.cat([(ours.exp() * (ours - theirs)).sum(dim=-1) for ours, theirs in logits])
        for model in (policy, opponent):
            install_packed_forward(model, fused_head=False)
        packed = PackedCollator("sdpa", VOCAB)(pairs)
        batch_loss(policy, packed, keep, reference_pass(opponent, packed, torch.float64))
    assert torch.allclose(found[0], expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_training_with_alpha_starts_at_ln_2_and_has_its_start_as_reference(tmp_path, batching, caplog):
    with caplog.at_level("INFO"):
        trainer = run(tmp_path, weights=True, alpha=ALPHA, beta=0.5, batching=batching, max_steps=4)
    assert trainer.first_loss.value == pytest.approx(
        math.log(2), abs=1e-5
    )  # policy and reference are the same: KL is 0
    start = tiny("llama")
    assert all(
        not torch.equal(ours, first) for ours, first in zip(trainer.model.parameters(), start.parameters(), strict=True)
    )
    with trainer.reference.in_place_of(trainer.model):
        for ours, first in zip(trainer.model.parameters(), start.parameters(), strict=True):
            assert torch.equal(ours, first)
    assert batching == "padded" or (not trainer.pair_forward.fused_head and "fused_head is off" in caplog.text)
    plain = run(tmp_path / "plain", weights=True, beta=0.5, batching=batching, max_steps=4)
    assert plain.reference is None
    difference = max(
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    )
    assert difference > 1e-6  # the term does something


def test_a_resumed_training_with_alpha_has_the_start_as_reference_still(tmp_path):
    settings = {"weights": True, "alpha": ALPHA, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, **settings, max_steps=4)
    resumed = run(tmp_path, **settings, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mixed_precision_never_gives_the_policy_the_weights_of_the_reference(tmp_path):
    """Autocast keeps 16-bit copies by weight, and both models are in the same weights one after the other."""
    trainer = run(tmp_path, weights=True, alpha=ALPHA, bf16=True, max_steps=4)
    assert trainer.first_loss.value == pytest.approx(math.log(2), abs=1e-5)  # both round in the same way
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and abs(margins[-1]) > 1e-3


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["q_proj", "lm_head"]])
def test_with_adapters_only_they_are_kept_and_a_trained_head_is_merged(tmp_path, targets):
    config = ModelConfig("tiny", use_peft=True, lora_r=4, lora_target_modules=targets)
    packed, padded = (
        run(
            tmp_path / batching,
            add_adapters(tiny("llama"), config),
            weights=True,
            alpha=ALPHA,
            max_steps=4,
            batching=batching,
        )
        for batching in ("packed", "padded")
    )
    apart = moved = 0.0
    for (name, ours), theirs in zip(packed.model.named_parameters(), padded.model.parameters(), strict=True):
        assert ours.requires_grad == ("lora_" in name)
        apart = max(apart, (ours - theirs).abs().max().item())
        moved = max(moved, ours.abs().max().item() if "lora_B" in name else 0.0)  # they start at 0
    assert apart < 1e-4 * moved


def test_what_cannot_be_exchanged_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = SimpleNamespace(alpha=0.5, fsdp="", deepspeed_plugin=None)
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_can_exchange(arguments, "alpha")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match=r"alpha is 0\.5.*FSDP version 1.*set fsdp_version: 2"):
        check_can_exchange(arguments, "alpha")


def test_a_head_that_is_no_matrix_is_refused_with_the_way_out():
    model = tiny("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(InputError, match=r"LlamaForCausalLM is a Sequential: set batching: padded, or alpha to 0"):
        check_head(model)
