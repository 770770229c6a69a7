"""Packed rows against a naive float64 implementation: every architecture, kernel, loss and grouping."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.logprobs import collators as batching
from spin.alignment.logprobs.attention import Tree, check_architecture
from spin.alignment.logprobs.collators import PackedCollator, PairCollator
from spin.alignment.logprobs.forward import batch_loss, install_packed_forward
from spin.alignment.logprobs.head import LogitTransform, logps_and_slopes
from spin.alignment.logprobs.plans import consecutive, plan_by_tokens, stretch_plan
from spin.alignment.methods.losses import LOSSES, LossInputs
from tests.helpers import tiny_llama

VOCAB = 64
PAIRS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
    {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9]},
]


def random_pairs(
    count: int, seed: int = 0, longest: int = 14, weights: bool = False, responses: tuple[str, ...] = SIDES
) -> list[dict[str, Any]]:
    """Pairs of uneven lengths with reference log-probs near those of a random model, and labels of all responses."""
    draw, labels = random.Random(seed), random.Random(seed + 1)
    found = []
    for _ in range(count):
        pair: dict[str, Any] = {
            f"{name}_ids": [draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))]
            for name in ("prompt", *responses)
        }
        for half in responses:
            pair[f"{half}_reference"] = [-4.2 + 0.2 * draw.random() for _ in pair[f"{half}_ids"]]
            if weights:
                pair[f"{half}_weights"] = [2 * draw.random() for _ in pair[f"{half}_ids"]]
            pair[f"{half}_win_prob"], pair[f"{half}_reward"] = labels.random(), labels.gauss(0, 1)
            pair[f"{half}_pair_win_prob"] = labels.random()
        found.append(pair)
    return found


def tiny(architecture: str, **settings: Any) -> torch.nn.Module:
    """A random model of an architecture, large enough weights to make its attention matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**shape, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral, long window": ("mistral", {"sliding_window": 64}),
    "mistral, short window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def objective_of(loss: str, **settings: Any):
    return lambda inputs: LOSSES[loss](inputs, **settings).losses.sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {
        name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return found


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative error of a whole gradient."""
    assert found.keys() == wanted.keys()
    flat = [torch.cat([grads[name].flatten() for name in sorted(wanted)]) for grads in (found, wanted)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def naive(model: torch.nn.Module, pairs: list[dict[str, Any]], objective) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient with one plain forward for each response: no batching, no padding, no sharing."""
    losses = []
    for pair in pairs:
        names = tuple(name for name in (*SIDES, INITIAL) if f"{name}_ids" in pair)
        width = max(len(pair[f"{name}_ids"]) for name in names)
        streams = torch.zeros(3, len(names), width, dtype=torch.float64)
        policy = []
        for row, half in enumerate(names):
            prompt, response = pair["prompt_ids"], pair[f"{half}_ids"]
            logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            policy.append(torch.cat([logps, logps.new_zeros(width - len(response))]))
            streams[0, row, : len(response)] = 1
            streams[1, row, : len(response)] = torch.tensor(pair[f"{half}_reference"])
            streams[2, row, : len(response)] = torch.tensor(pair.get(f"{half}_weights", [1.0] * len(response)))
        labels = {
            label: torch.tensor([pair[f"{name}_{label}"] for name in names], dtype=torch.float64)
            for label in ("win_prob", "pair_win_prob", "reward")
        }
        inputs = LossInputs(torch.stack(policy), streams[1], streams[0], streams[2], None, labels, names)
        losses.append(objective(inputs))
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), gradients(model)


def test_row_by_row():
    batch = PackedCollator()(PAIRS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert batch.targets.tolist() == [3, 7, 8, 4, 5, 9]
    assert batch.predictors.tolist() == [1, 5, 6, 1, 3, 5]
    assert list(batch.layout.trees) == [Tree(2, (1, 2)), Tree(1, (2, 1))]
    (group,) = batch.groups
    assert group.rows == slice(0, 6) and group.pairs == 2
    assert group.completion_mask.tolist() == [[True, False], [True, True], [True, True], [True, False]]


def test_without_sharing_the_prompt_stands_before_each_response():
    batch = PackedCollator(share_prompts=False)(PAIRS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 4, 5, 6, 7, 8, 6, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [3, 7, 8, 4, 5, 9]
    assert batch.predictors.tolist() == [1, 7, 8, 4, 5, 10]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logps_and_gradients_of_every_architecture_equal_the_naive_ones(name):
    architecture, settings = ARCHITECTURES[name]
    model = tiny(architecture, **settings).double()
    pairs = random_pairs(5)
    wanted_loss, wanted = naive(model, pairs, objective_of("sigmoid"))
    check_architecture(model)
    model = tiny(architecture, **settings).double()
    assert install_packed_forward(model)
    loss = batch_loss(model, PackedCollator()(pairs), objective_of("sigmoid"))
    loss.backward()
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-6)  # the stored log-probs are float32
    assert relative(gradients(model), wanted) < 1e-6


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("fused", [True, False], ids=["fused head", "recomputed head"])
def test_float32_stays_within_1e_5_of_float64_for_every_loss(loss, fused, monkeypatch):
    monkeypatch.setattr(batching, "GROUP_ELEMENTS", 20 * VOCAB)  # several groups
    responses = LOSSES[loss].responses
    pairs = random_pairs(6, weights=True, responses=responses)
    wanted_loss, wanted = naive(tiny("llama").double(), pairs, objective_of(loss))
    model = tiny("llama")
    assert install_packed_forward(model, fused) == fused
    batch = PackedCollator(vocab_size=VOCAB, responses=responses)(pairs)
    assert len(batch.groups) > 2
    found = batch_loss(model, batch, objective_of(loss))
    found.backward()
    assert found.item() == pytest.approx(wanted_loss, rel=1e-5)
    assert relative(gradients(model), wanted) < 1e-5


def test_bfloat16_autocast_stays_within_stated_bounds():
    """Loss within 1 %, gradient within 5 %; the padded path is not closer."""
    pairs = random_pairs(8)
    _, wanted = naive(tiny("llama").double(), pairs, objective_of("sigmoid"))
    errors = {}
    for name, collator in (("packed", PackedCollator()), ("padded", PairCollator(0))):
        model = tiny("llama")
        if name == "packed":
            install_packed_forward(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = batch_loss(model, collator(pairs), objective_of("sigmoid"))
        loss.backward()
        errors[name] = relative(gradients(model), wanted)
    assert errors["packed"] < 0.05
    assert errors["packed"] < 1.5 * errors["padded"]


@pytest.mark.parametrize("share", [True, False])
def test_loss_does_not_depend_on_packing(share):
    pairs = random_pairs(7)
    model = tiny("qwen3").double()
    install_packed_forward(model)
    collator = PackedCollator(share_prompts=share)
    whole = batch_loss(model, collator(pairs), objective_of("sigmoid"))
    whole.backward()
    wanted = gradients(model)
    for plan in plan_by_tokens([collator.tokens(pair) for pair in pairs], 50):
        part = batch_loss(model, collator([pairs[index] for index in plan]), objective_of("sigmoid"))
        part.backward()
        whole = whole - part
    assert abs(whole.item()) < 1e-9
    assert relative(gradients(model), wanted) < 1e-9


def test_gradient_checkpointing_gives_the_same_gradient():
    pairs = random_pairs(4)
    found = []
    for on in (False, True):
        model = tiny("llama", sliding_window=4).double().train()
        install_packed_forward(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch_loss(model, PackedCollator()(pairs), objective_of("sigmoid")).backward()
        found.append(gradients(model))
    assert relative(found[1], found[0]) < 1e-12


def test_a_scaled_backward_pass_scales_the_gradient():
    pairs, found = random_pairs(3), []
    for scale in (1.0, 3.0):
        model = tiny("llama").double()
        install_packed_forward(model)
        (scale * batch_loss(model, PackedCollator()(pairs), objective_of("sigmoid"))).backward()
        found.append({name: grad / scale for name, grad in gradients(model).items()})
    assert relative(found[1], found[0]) < 1e-6  # the model's norms are float32


def test_frozen_head_and_head_bias():
    pairs = random_pairs(4)
    results = []
    for fused in (True, False):
        model = tiny("llama").double()
        torch.manual_seed(1)
        head = torch.nn.Linear(32, VOCAB, dtype=torch.float64)
        head.weight.requires_grad_(False)
        model.set_output_embeddings(head)
        install_packed_forward(model, fused)
        batch_loss(model, PackedCollator()(pairs), objective_of("sigmoid")).backward()
        results.append(gradients(model))
    assert "lm_head.bias" in results[0] and "lm_head.weight" not in results[0]
    assert relative(results[0], results[1]) < 1e-9


def test_logits_are_made_for_one_group_at_a_time(monkeypatch):
    monkeypatch.setattr(batching, "GROUP_ELEMENTS", 30 * VOCAB)
    pairs = random_pairs(12)
    model = tiny("llama")
    install_packed_forward(model)
    batch = PackedCollator(vocab_size=VOCAB)(pairs)
    sizes: list[int] = []
    original = torch.mm

    def watched(left, right, *args, **kwargs):
        product = original(left, right, *args, **kwargs)
        if product.shape[-1] == VOCAB:
            sizes.append(len(product))
        return product

    monkeypatch.setattr(torch, "mm", watched)
    batch_loss(model, batch, objective_of("sigmoid")).backward()
    longest = max(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    assert len(sizes) == len(batch.groups) > 3 and max(sizes) <= max(30, longest)


def test_slopes_keep_what_16_bits_would_lose():
    logits = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.bfloat16)
    logps = logps_and_slopes(logits, torch.tensor([0]), LogitTransform())
    probability = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64).softmax(0)[0].item()
    assert logits[0, 0].item() == pytest.approx(probability - 1, rel=4e-3)
    assert logps.item() == pytest.approx(math.log(probability), rel=1e-3)


def test_plans_keep_every_pair_and_the_budget():
    draw = random.Random(1)
    for _ in range(50):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 30))]
        plan = plan_by_tokens(sizes, 60)
        assert sorted(index for indices in plan for index in indices) == list(range(len(sizes)))
        assert all(sum(sizes[index] for index in indices) <= 60 for indices in plan)
        assert len(plan) <= 1.5 * sum(sizes) / 60 + 1
        stretched = stretch_plan(plan, len(plan) + draw.randint(0, 12))
        assert sorted(index for indices in stretched for index in indices) == list(range(len(sizes)))
    assert plan_by_tokens([100, 1], 60) == [[0], [1]]
    assert sorted(stretch_plan([[0, 1, 2]], 5), key=len)[:2] == [[], []]


def test_the_model_keeps_its_own_forward():
    model = tiny_llama(VOCAB)
    ids = torch.arange(5)[None]
    before = model(ids).logits
    install_packed_forward(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),  # every pair is in the parts that an earlier command wrote
        ([3], [range(1)]),
        ([9, 2, 3, 4], [range(1), range(1, 3), range(3, 4)]),  # the first is larger than the limit
    ],
)
def test_runs_of_at_most_five_tokens(sizes, runs):
    assert consecutive(sizes, 5) == runs
