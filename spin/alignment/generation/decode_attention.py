"""Attention of one new token for each row against a cache, plugged into transformers' attention interface.

The library's own call repeats the keys and values of grouped heads in every step, and leaves out soft-capped scores. Here the
query heads of a group are rows of one product with the keys they share, which are read where they lie in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODE_ATTENTION = "spin_decode"


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query ``(B, H, Q, D)``, keys ``(B, H/groups, T, D)`` -> ``(B, Q, H, D)``.

    ``attention_mask`` is True where a query sees a key, shape ``(B, 1, Q, T)``; None is causal. Several queries, a prefill, are
    left to the library unless scores are capped.
    """
    queries, keys = query.shape[2], key.shape[2]
    if position_bias is not None or (queries > 1 and softcap is None):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    rows, heads, _, size = query.shape
    shared = key.shape[1]
    query = query * (scaling if scaling is not None else size**-0.5)
    query = query.reshape(rows * shared, -1, size)
    scores = torch.bmm(query, key.reshape(rows * shared, keys, size).transpose(1, 2))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if attention_mask is None and queries > 1:
        attention_mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if attention_mask is not None:
        # The lowest number, not minus infinity: a padding query sees no key at all, and must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores.view(rows, shared, -1, queries, keys).masked_fill_(~attention_mask[:, :, None], lowest)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    mixed = torch.bmm(weights, value.reshape(rows * shared, keys, value.shape[-1]))
    return mixed.view(rows, heads, queries, -1).transpose(1, 2), None


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let a model that would use the library's SDPA use :func:`decode_attention` within the block."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    config._attn_implementation = DECODE_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, sdpa_mask)
