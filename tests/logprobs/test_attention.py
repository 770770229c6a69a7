"""Attention kernels of packed rows: the same attention from each, the right one chosen, other architectures refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.gpu.kernels import naive_attention
from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.attention import (
    KERNELS,
    AttentionCall,
    PackedLayout,
    Tree,
    check_architecture,
    choose_kernel,
    varlen_kernel,
)
from spin.alignment.logprobs.collators import PackedCollator
from spin.alignment.logprobs.forward import batch_logps, install_packed_forward
from tests.logprobs.test_packed_rows import PAIRS, tiny


def layouts() -> list[PackedLayout]:
    trees = (Tree(3, (4, 2)), Tree(1, (1, 5)), Tree(6, (2,)), Tree(2, (3, 3, 1)))
    return [PackedLayout(trees, torch.device("cpu"))]


def emulated_varlen(query, key, value, queries, keys, max_q, max_k, *, scale, window_size, enable_gqa):
    """What PyTorch's documentation promises of ``varlen_attn``, with the diagonal at the last key."""
    assert queries.dtype == keys.dtype == torch.int32 and queries[-1] == len(query) and keys[-1] == len(key)
    assert max_q == queries.diff().max() and max_k == keys.diff().max() and window_size[1] == 0
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    found = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        q, k, v = query[q0:q1], *(piece[k0:k1].repeat_interleave(groups, 1) for piece in (key, value))
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        hidden = (distance < 0) if window_size[0] < 0 else (distance < 0) | (distance > window_size[0])
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, float("-inf"))
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(found)


def emulated_old_varlen(
    query, key, value, queries, keys, max_q, max_k, *, return_aux=None, scale, window_size=(-1, -1)
):
    """The signature of torch 2.11, whose kernel accepts grouped heads without ``enable_gqa``."""
    grouped = query.shape[1] != key.shape[1]
    settings = {"scale": scale, "window_size": window_size, "enable_gqa": grouped}
    return emulated_varlen(query, key, value, queries, keys, max_q, max_k, **settings)


@pytest.mark.parametrize(
    "call",
    [
        AttentionCall(0.4, None, None),
        AttentionCall(0.4, 3, None),
        AttentionCall(0.4, None, 1.5),
        AttentionCall(0.4, 3, 1.5),
    ],
    ids=["plain", "window", "softcap", "window and softcap"],
)
@pytest.mark.parametrize("kernel", [*sorted(KERNELS), "varlen of torch 2.11"])
def test_every_kernel_computes_the_same_attention(kernel, call, monkeypatch):
    if kernel.startswith("varlen"):
        emulation = emulated_varlen if kernel == "varlen" else emulated_old_varlen
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", emulation)
        kernel = "varlen"
    (layout,) = layouts()
    tokens = sum(tree.tokens for tree in layout.trees)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, tokens, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    wanted = naive_attention(query, key, value, layout, call)
    direction = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * direction).sum(), (query, key, value))
    if kernel == "flex":  # it has no gradient on a CPU
        query, key, value = (states.detach() for states in (query, key, value))
    if kernel == "varlen" and call.softcap is not None:
        with pytest.raises(InputError, match="cannot cap attention scores"):
            varlen_kernel(query, key, value, layout, call)
        return
    found = KERNELS[kernel](query, key, value, layout, call)
    assert torch.allclose(found, wanted, atol=1e-10)
    if kernel == "flex":
        return
    slopes = torch.autograd.grad((found * direction).sum(), (query, key, value))
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(slopes, expected, strict=True))


def test_varlen_counts_its_window_without_the_query_itself():
    layout, seen = layouts()[0], {}

    def kernel(query, *_, window_size, **__):
        seen["window"] = window_size
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        tokens = sum(tree.tokens for tree in layout.trees)
        states = torch.zeros(1, 2, tokens, 8)
        varlen_kernel(states, states, states, layout, AttentionCall(1.0, 4, None))
    assert seen["window"] == (3, 0)


def test_kernels_are_chosen_by_device_precision_and_model():
    plain, capped = tiny("llama"), tiny("gemma2")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_kernel(plain, gpu, torch.bfloat16) == "varlen"
    assert choose_kernel(plain, gpu, torch.float32) == "flex"
    assert choose_kernel(capped, gpu, torch.bfloat16) == "flex"
    assert choose_kernel(plain, cpu, torch.bfloat16) == "sdpa"
    assert choose_kernel(plain, gpu, torch.bfloat16, "sdpa") == "sdpa"
    with pytest.raises(InputError, match="packed_attention is flex, but it has no gradient on a CPU"):
        choose_kernel(plain, cpu, torch.float32, "flex")
    with pytest.raises(InputError, match="packed_attention is varlen, but it needs a GPU"):
        choose_kernel(plain, cpu, torch.float32, "varlen")


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("mamba", {"state_size": 4}, "linear_attention"),
        ("qwen3_next", {"num_experts": 2, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ("bloom", {"n_head": 4}, "does not allow its attention to be replaced"),
    ],
)
def test_other_architectures_are_refused_by_name(architecture, settings, reason):
    model = tiny(architecture, **settings)
    with pytest.raises(InputError, match=f"(?s){type(model).__name__}.*{reason}.*set batching: padded"):
        check_architecture(model)


def test_attention_sinks_are_refused():
    model = tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    install_packed_forward(model)
    with pytest.raises(InputError, match=r"attention sinks.*set batching: padded"):
        batch_logps(model, PackedCollator()(PAIRS))
