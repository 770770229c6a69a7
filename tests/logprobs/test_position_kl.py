"""The weighted sequence-KL term against a naive float64 computation, packed and padded; what refuses it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.attention import PACKED_ATTENTION
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import batch_loss, install_packed_forward, use_attention
from spin.alignment.logprobs.head import LogitTransform
from spin.alignment.logprobs.position_kl import check_can_keep_reference, frozen_copy, position_kl
from spin.alignment.methods.losses import LOSSES
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
    opponent = frozen_copy(policy, torch.device("cpu"))
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
    install_packed_forward(policy, fused_head=False)
    use_attention(opponent, PACKED_ATTENTION)
    batch = PackedCollator("sdpa", 2**24, share_prompts)(pairs)
    assert len(batch.groups) > 1
    loss = batch_loss(policy, batch, objective, opponent)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert farthest(policy, gradients) < max(1e-6, 10 * tolerance)
    with torch.no_grad():
        assert batch_loss(policy, batch, objective, opponent).item() == pytest.approx(loss.item(), rel=1e-12)
    assert all(parameter.grad is None for parameter in opponent.parameters())


def test_padded_rows_give_the_naive_loss_and_gradient():
    policy, opponent = two_models()
    pairs = random_pairs(5, weights=True)
    expected = naive(policy, opponent, pairs)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    loss = batch_loss(policy, PairCollator(0)(pairs), objective, opponent)
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
        batch_loss(policy, PairCollator(0)(pairs), keep, opponent)
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
        install_packed_forward(policy, fused_head=False)
        use_attention(opponent, PACKED_ATTENTION)
        batch_loss(policy, PackedCollator("sdpa", VOCAB)(pairs), keep, opponent)
    assert torch.allclose(found[0], expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_training_with_alpha_starts_at_ln_2_and_keeps_the_opponent(tmp_path, batching, caplog):
    with caplog.at_level("INFO"):
        trainer = run(tmp_path, weights=True, alpha=ALPHA, beta=0.5, batching=batching, max_steps=4)
    assert trainer.first_loss.value == pytest.approx(math.log(2), abs=1e-5)  # policy and opponent are the same: KL is 0
    start = tiny("llama")
    for (_, kept), (_, first) in zip(trainer.opponent.named_parameters(), start.named_parameters(), strict=True):
        assert torch.equal(kept, first)
    assert batching == "padded" or (not trainer.pair_forward.fused_head and "fused_head is off" in caplog.text)
    plain = run(tmp_path / "plain", weights=True, beta=0.5, batching=batching, max_steps=4)
    assert plain.opponent is None
    difference = max(
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    )
    assert difference > 1e-6  # the term does something


def test_models_held_in_pieces_are_refused_by_name(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    check_can_keep_reference(SimpleNamespace(alpha=0.0, fsdp="full_shard", deepspeed_plugin=None))
    check_can_keep_reference(SimpleNamespace(alpha=0.5, fsdp="", deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    with pytest.raises(InputError, match=r"alpha is 0\.5.*DeepSpeed ZeRO-3 shards models: set alpha to 0"):
        check_can_keep_reference(SimpleNamespace(alpha=0.5, fsdp="", deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"FSDP\d shards models"):
        check_can_keep_reference(SimpleNamespace(alpha=0.5, fsdp="", deepspeed_plugin=None))
