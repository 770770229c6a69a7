"""Attention in 16 bits on a CPU: the gradient of a packed row, computed from matrix products.

PyTorch's CPU kernel is fast in its forward pass, but its backward pass took 6 to 17 times as long for segments of 100 to 400
tokens, a quarter of a training step. The products here run on the 16-bit instructions of the processor.

Shapes: T tokens in the row, H query heads, KV key-value heads, G = H / KV, D head size, Q queries and K keys of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

# Queries of a block. The keys after a block are not computed.
_BLOCK = 256


@dataclass(frozen=True)
class Segment:
    """Queries in a row, and the pieces of the row that are their keys; the queries are the last of the keys."""

    queries: slice
    keys: tuple[slice, slice]


class SegmentAttention(torch.autograd.Function):
    """Causal attention of every segment of a row, without window or soft cap.

    Query ``(1, H, T, D)``, key and value ``(1, KV, T, D)``, all in one 16-bit precision; ``attend`` computes the forward pass
    ``(1, T, H, D)`` from them. The probabilities are computed again in the backward pass, from scores in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        scale: float,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        attended = attend(query, key, value)
        ctx.save_for_backward(query, key, value, attended)
        ctx.segments, ctx.scale = segments, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            slope = grads[0].to(query.dtype).transpose(1, 2)[0]  # (H, T, D)
            # sum_k P dP, the term that the softmax subtracts, is the product of the output and its gradient.
            inner = (slope.float() * attended.transpose(1, 2)[0]).sum(dim=-1, keepdim=True)  # (H, T, 1)
            states = (query[0], key[0], value[0])
            found = _row_gradients(states, slope, inner, ctx.segments, ctx.scale)
        return (*(grad.unsqueeze(0).to(query.dtype) for grad in found), None, None, None)


def _row_gradients(
    states: tuple[Tensor, Tensor, Tensor], slope: Tensor, inner: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query ``(H, T, D)``, key and value ``(KV, T, D)``; the last two in float32."""
    query, key, value = states
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    mask = _causal_mask(min(_BLOCK, max(segment.queries.stop - segment.queries.start for segment in segments)))
    for segment in segments:
        keys, values = (torch.cat([some[:, part] for part in segment.keys], dim=1) for some in (key, value))
        own_keys, own_values = (torch.zeros(keys.shape, dtype=torch.float32) for _ in range(2))  # (KV, K, D)
        wide_keys = keys.float()
        begin, end = segment.queries.start, segment.queries.stop
        before = keys.shape[1] - (end - begin)  # keys that all queries of the segment see
        for first in range(begin, end, _BLOCK):
            rows = slice(first, min(end, first + _BLOCK))
            seen = before + rows.stop - begin
            visible = (keys[:, :seen], values[:, :seen], wide_keys[:, :seen])
            block = (query[:, rows], slope[:, rows], inner[:, rows])
            grad_query[:, rows], for_keys, for_values = _block_gradients(block, visible, mask, scale)
            own_keys[:, :seen] += for_keys
            own_values[:, :seen] += for_values
        start = 0
        for part in segment.keys:
            length = part.stop - part.start
            grad_key[:, part] += own_keys[:, start : start + length]
            grad_value[:, part] += own_values[:, start : start + length]
            start += length
    return grad_query, grad_key.mul_(scale), grad_value


def _block_gradients(
    block: tuple[Tensor, Tensor, Tensor], visible: tuple[Tensor, Tensor, Tensor], mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block's queries ``(H, Q, D)``, of its keys (without ``scale``) and values ``(KV, K, D)``.

    ``block``: queries, the gradient of their output, and the inner product of it and the output, ``(H, Q, 1)``; ``visible``:
    keys, values, and keys in float32, of which the last Q are those of the queries.
    """
    query, slope, inner = block
    keys, values, wide_keys = visible
    heads, rows = query.shape[:2]
    kv_heads, seen = keys.shape[:2]
    # The G query heads of a key-value head are further rows of one product.
    query, slope, inner = (some.reshape(kv_heads, -1, some.shape[-1]) for some in block)  # (KV, G * Q, D or 1)
    scores = torch.bmm(query.float().mul_(scale), wide_keys.transpose(1, 2))  # (KV, G * Q, K)
    scores.view(kv_heads, -1, rows, seen)[..., seen - rows :].add_(mask[:rows, :rows])
    probabilities = torch.softmax(scores, dim=-1)
    for_values = torch.bmm(probabilities.to(values.dtype).transpose(1, 2), slope)
    # dS = P (dP - sum P dP)
    for_scores = torch.sub(torch.bmm(slope, values.transpose(1, 2)), inner).mul_(probabilities).to(keys.dtype)
    for_query = torch.bmm(for_scores, keys).mul_(scale).view(heads, rows, -1)
    return for_query, torch.bmm(for_scores.transpose(1, 2), query), for_values


def _causal_mask(rows: int) -> Tensor:
    """Return the additive mask of queries on their own keys, float32 of shape ``(rows, rows)``."""
    return torch.full((rows, rows), float("-inf")).triu_(1)
