"""Attention and RMSNorm in 16 bits on a CPU: as accurate as PyTorch's own, on every kind of row, model and norm."""

from __future__ import annotations

import pytest
import torch

from spin.alignment.logprobs import cpu_attention, cpu_norms
from spin.alignment.logprobs.attention import AttentionCall, PackedLayout, Tree, _attend_segments, sdpa_kernel
from spin.alignment.logprobs.cpu_norms import CachedRMSNorm, install_cpu_norms
from tests.logprobs.test_packed_rows import ARCHITECTURES, tiny

TREES = (Tree(30, (40, 25)), Tree(1, (1, 50)), Tree(60, (20,)), Tree(12, (13, 3, 31)))


def attention_errors(kernel, layout: PackedLayout, call: AttentionCall, kv_heads: int) -> list[float]:
    """Relative errors of the output and of the three gradients of a kernel in bfloat16, against float64."""
    tokens = sum(tree.tokens for tree in layout.trees)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, tokens, 16, generator=generator).bfloat16() for heads in (4, kv_heads, kv_heads)]
    direction = torch.randn(1, tokens, 4, 16, generator=generator).bfloat16()
    results = []
    for run, dtype in ((_attend_segments, torch.float64), (kernel, torch.bfloat16)):
        leaves = [some.to(dtype).requires_grad_() for some in states]
        attended = run(*leaves, layout, call)
        results.append([attended, *torch.autograd.grad(attended, leaves, direction.to(dtype))])
    wanted, found = results
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [256, 16])
@pytest.mark.parametrize("window", [None, 100, 7])
def test_the_gradient_of_attention_is_as_accurate_as_pytorchs(kv_heads, block, window, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_BLOCK", block)
    layout, call = PackedLayout(TREES, torch.device("cpu")), AttentionCall(0.3, window, None)
    ours = attention_errors(sdpa_kernel, layout, call, kv_heads)
    theirs = attention_errors(_attend_segments, layout, call, kv_heads)
    assert max(ours) < 0.01
    assert all(one < 1.6 * other for one, other in zip(ours, theirs, strict=True))


def test_it_is_used_where_it_applies(monkeypatch):
    used = []
    monkeypatch.setattr(
        "spin.alignment.logprobs.attention.SegmentAttention.apply",
        lambda query, *_: used.append(query.dtype) or query.transpose(1, 2),
    )
    layout = PackedLayout(TREES, torch.device("cpu"))
    states = [torch.randn(1, 2, sum(tree.tokens for tree in TREES), 8) for _ in range(3)]
    plain, window, cap = (AttentionCall(None, *rest) for rest in ((None, None), (5, None), (None, 2.0)))
    sdpa_kernel(*states, layout, plain)  # no gradient
    leaves = [some.requires_grad_() for some in states]
    sdpa_kernel(*leaves, layout, plain)  # float32
    with torch.autocast("cpu", torch.bfloat16):
        sdpa_kernel(*leaves, layout, window)
        sdpa_kernel(*leaves, layout, cap)
        assert not used
        sdpa_kernel(*leaves, layout, plain)
    sdpa_kernel(*(some.bfloat16() for some in leaves), layout, plain)
    assert used == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_and_its_gradients_equal_autograds(offset, monkeypatch):
    monkeypatch.setattr(cpu_norms, "_BLOCK_ELEMENTS", 64)  # several blocks
    generator = torch.Generator().manual_seed(0)
    states, weight, direction = (torch.randn(shape, generator=generator) for shape in ((2, 7, 24), (24,), (2, 7, 24)))
    results = []
    for compute in (
        lambda x, w: (offset + w) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
        lambda x, w: CachedRMSNorm.apply(x, w, offset, 1e-3, torch.float32),
    ):
        leaves = [some.clone().requires_grad_() for some in (states, weight)]
        normed = compute(*leaves)
        results.append([normed, *torch.autograd.grad(normed, leaves, direction)])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_of_every_architecture_compute_what_the_model_does(name):
    architecture, settings = ARCHITECTURES[name]
    model = tiny(architecture, **settings)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, len(norm.weight), generator=generator) for norm in norms]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight)
    wanted = [norm(states) for norm, states in zip(norms, inputs, strict=True)]
    assert install_cpu_norms(model) == len(norms)
    for norm, states, before in zip(norms, inputs, wanted, strict=True):
        assert torch.equal(norm(states), before)  # without autocast the model's own
        with torch.autocast("cpu", torch.bfloat16):
            found = norm(states)
        assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), before, rtol=0.005, atol=1e-5)


def test_other_norms_keep_their_forward():
    class HalfNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, states):
            return self.weight * states / states.abs().mean(-1, keepdim=True)

    assert install_cpu_norms(torch.nn.Sequential(torch.nn.LayerNorm(8), HalfNorm())) == 0


def test_float16_is_supported():
    layout, call = PackedLayout(TREES, torch.device("cpu")), AttentionCall(None, None, None)
    states = [torch.randn(1, 2, sum(tree.tokens for tree in TREES), 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(sdpa_kernel(*states, layout, call).float().sum(), states)
    wanted = torch.autograd.grad(sdpa_kernel(*states, layout, call).sum(), states)
    assert all(torch.allclose(one, other, atol=0.02) for one, other in zip(found, wanted, strict=True))
