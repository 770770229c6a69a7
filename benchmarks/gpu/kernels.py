"""Attention kernels of packed rows: their errors against naive attention in float64, forward and backward, and their speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.part import Findings, median_seconds, start_of_peak
from benchmarks.harness import peak_bytes
from benchmarks.shapes import SHAPES, draw_lengths
from spin.alignment.logprobs.attention import KERNELS, AttentionCall, PackedLayout, Tree

if TYPE_CHECKING:
    from torch import Tensor

States = tuple["Tensor", "Tensor", "Tensor"]
# A kernel may be this many times as far from float64 as naive attention in its own precision is; below the floor, both are noise.
ERROR_FACTOR, ERROR_FLOOR = 3.0, 1e-5
CHECKED_PAIRS, REPETITIONS = 2, 5


@dataclass(frozen=True)
class Heads:
    """The attention of a model: query heads, key-value heads, head size, window (keys) and soft cap."""

    queries: int
    keys: int
    size: int
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def call(self) -> AttentionCall:
        return AttentionCall(self.size**-0.5, self.window, self.softcap)

    def states(self, tokens: int, device: str) -> States:
        """Return random query ``(1, H, T, D)``, key and value ``(1, KV, T, D)`` that have gradients."""
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, tokens, self.size, device=device).to(self.dtype).requires_grad_()
            for heads in (self.queries, self.keys, self.keys)
        )
        return query, key, value


HEADS = {
    # First those for which training chooses FlexAttention.
    "gemma2-2b": Heads(8, 4, 256, window=512, softcap=50.0),
    "llama-float32": Heads(32, 8, 64, dtype=torch.float32),
    "mistral-7b": Heads(32, 8, 128),
    "qwen2-0.5b": Heads(14, 2, 64),
    "llama-window": Heads(32, 8, 64, window=512),
}
TINY_HEADS = {
    "tiny": Heads(4, 2, 16),
    "tiny-capped": Heads(4, 2, 16, window=8, softcap=5.0),
    "tiny-float32": Heads(4, 2, 16, dtype=torch.float32),
}


def measure_kernels(findings: Findings) -> None:
    """Record, for every attention and kernel, its errors on a short row and its times on a row of a UC and of an LP step."""
    heads = TINY_HEADS if findings.tiny else HEADS
    # FlexAttention is compiled for every case, which takes longest: last.
    for kernel in ("naive", "varlen", "sdpa", "flex"):
        for name, each in heads.items():
            reason = unsupported(kernel, each, findings.device)
            if reason:
                findings.add(f"{name} {kernel}", {"skipped": reason})
            else:
                findings.attempt(f"{name} {kernel}", partial(measure_kernel, kernel, each, findings))
    findings.failed += [name for name, found in findings.facts.items() if found.get("agrees") is False]


def unsupported(kernel: str, heads: Heads, device: str) -> str | None:
    """Return why a kernel cannot compute this attention on this device, or None."""
    if kernel in ("varlen", "flex") and device == "cpu":
        return "it needs a GPU"
    if kernel == "varlen" and (heads.softcap is not None or heads.dtype == torch.float32):
        return "it needs 16-bit precision and scores without a soft cap"
    return None


def measure_kernel(kernel: str, heads: Heads, findings: Findings) -> dict[str, Any]:
    """Return errors, ``agrees``, and milliseconds and peak bytes per shape of row."""
    device = findings.device
    attend = naive_attention if kernel == "naive" else KERNELS[kernel]
    found: dict[str, Any] = compare(attend, heads, make_layout("uc", CHECKED_PAIRS, device, findings.tiny))
    for shape in ("uc", "lp"):
        pairs = 2 if findings.tiny else SHAPES[shape].batch_size
        found[shape] = measure_speed(attend, heads, make_layout(shape, pairs, device, findings.tiny), device)
    return found


def make_layout(shape: str, pairs: int, device: str, tiny: bool) -> PackedLayout:
    """Return the layout of a packed row of pairs with the lengths of a shape."""
    lengths = draw_lengths(SHAPES[shape], pairs, np.random.default_rng(0))
    if tiny:
        lengths = lengths // 16 + 1
    return PackedLayout([Tree(p, (c, r)) for p, c, r in lengths.tolist()], torch.device(device))


def naive_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall) -> Tensor:
    """Attend with a ``T x T`` mask and stored scores: query ``(1, H, T, D)`` -> ``(1, T, H, D)``."""
    trees, branches, positions = layout.token_marks
    distance = positions[:, None] - positions
    seen = (trees[:, None] == trees) & ((branches == 0) | (branches[:, None] == branches)) & (distance >= 0)
    if call.window is not None:
        seen &= distance < call.window
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * call.scaling  # (1, H, T, T)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def compare(attend: Callable[..., Tensor], heads: Heads, layout: PackedLayout) -> dict[str, Any]:
    """Return the largest errors of output and gradients relative to the largest value, beside those of naive attention."""
    tokens = sum(tree.tokens for tree in layout.trees)
    states = heads.states(tokens, layout.device.type)
    direction = torch.randn(1, tokens, heads.queries, heads.size, device=layout.device).to(heads.dtype)
    wide: Any = tuple(some.detach().double().requires_grad_() for some in states)
    wanted = output_and_slopes(naive_attention, wide, direction.double(), layout, heads.call)
    errors = {}
    for name, function in (("errors", attend), ("naive_errors", naive_attention)):
        found = output_and_slopes(function, states, direction, layout, heads.call)
        errors[name] = [
            ((one.double() - other).abs().max() / other.abs().max()).item()
            for one, other in zip(found, wanted, strict=True)
        ]
    limits = [ERROR_FLOOR + ERROR_FACTOR * error for error in errors["naive_errors"]]
    agrees = all(error <= limit for error, limit in zip(errors["errors"], limits, strict=True))
    return {"agrees": agrees, "tokens": tokens, "of": ["output", "query", "key", "value"], **errors}


def output_and_slopes(
    attend: Callable[..., Tensor], states: States, direction: Tensor, layout: PackedLayout, call: AttentionCall
) -> list[Tensor]:
    """Return the output and the gradients of query, key and value for a gradient ``direction`` of the output."""
    output = attend(*states, layout, call)
    return [output.detach(), *torch.autograd.grad(output, states, direction)]


def measure_speed(attend: Callable[..., Tensor], heads: Heads, layout: PackedLayout, device: str) -> dict[str, Any]:
    """Return the milliseconds of the forward pass, and of both passes with their peak memory in bytes."""
    tokens = sum(tree.tokens for tree in layout.trees)
    states = heads.states(tokens, device)
    direction = torch.randn(1, tokens, heads.queries, heads.size, device=device).to(heads.dtype)

    def forward() -> None:
        with torch.no_grad():
            attend(*states, layout, heads.call)

    def both() -> None:
        output_and_slopes(attend, states, direction, layout, heads.call)

    start_of_peak(device)
    seconds = [median_seconds(device, work, REPETITIONS) for work in (forward, both)]
    found: dict[str, Any] = {"tokens": tokens, "forward_ms": 1e3 * seconds[0], "both_ms": 1e3 * seconds[1]}
    return found | ({"peak_bytes": peak_bytes(device)} if device == "cuda" else {})
