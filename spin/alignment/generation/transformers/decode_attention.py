"""Attention of one new token for each row against a cache, plugged into transformers' attention interface.

The library's own call reads the padding of every row, repeats the keys and values of grouped heads in every step, and leaves out
soft caps. Here each row's keys are read where they lie in the cache, from the row's first column on, and the query heads of a
group are rows of one product with the keys they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODE_ATTENTION = "spin_decode"
# Bytes of keys and values that are read in the time that calling one more product takes, on one CPU core: 24 us at 7 GB/s.
_BYTES_PER_CALL = 168_000


class _Block(NamedTuple):
    """Neighbouring rows, the first column that one of them sees, and which see which column, None for all."""

    first: int
    last: int
    start: int
    mask: Tensor | None


class RaggedRows:
    """How many columns before each row are padding, for all layers of a step; ``width`` counts the new column."""

    def __init__(self, padding: Sequence[int], device: torch.device, column_bytes: int) -> None:
        """Join neighbouring rows into blocks where that costs less than a call; ``column_bytes`` is one row's in one layer."""
        worth = _BYTES_PER_CALL / column_bytes if device.type == "cpu" else float("inf")
        self._blocks = _join_neighbours(padding, worth)
        self._padding, self._host = torch.tensor(padding, device=device)[:, None, None, None], padding
        self._made: dict[int, list[_Block]] = {}
        self._width = 0
        self.uses = 0

    def begin(self, width: int) -> None:
        """Begin a step over ``width`` columns."""
        self._width = width
        self._made.clear()

    def blocks(self, columns: int) -> list[_Block]:
        """Return the blocks of a layer that holds the last ``columns`` columns."""
        self.uses += 1
        if columns not in self._made:
            self._made[columns] = [self._block(first, last, self._width - columns) for first, last in self._blocks]
        return self._made[columns]

    def _block(self, first: int, last: int, dropped: int) -> _Block:
        padding = self._host[first:last]
        start = max(0, min(padding) - dropped)
        if max(padding) <= dropped + start:
            return _Block(first, last, start, None)
        places = torch.arange(dropped + start, self._width, device=self._padding.device)
        return _Block(first, last, start, places >= self._padding[first:last])


def _join_neighbours(padding: Sequence[int], worth: float) -> list[tuple[int, int]]:
    """Return (first, last) of blocks of rows; a block ends before its padding comes to more than ``worth`` columns."""
    blocks, first, least, wasted = [], 0, padding[0], 0
    for row, columns in enumerate(padding):
        wasted += (row - first) * max(0, least - columns) + max(0, columns - least)
        if wasted > worth:
            blocks.append((first, row))
            first, least, wasted = row, columns, 0
        least = min(least, columns)
    return [*blocks, (first, len(padding))]


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    ragged_rows: RaggedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query ``(B, H, Q, D)``, keys ``(B, H/groups, T, D)`` -> ``(B, Q, H, D)``.

    ``ragged_rows`` reaches it as a keyword argument of the model's forward and stands in for the mask, which else is True where a
    query sees a key, shape ``(B, 1, Q, T)``, None for causal. A prefill is left to the library unless scores are capped.
    """
    rows, heads, queries, size = query.shape
    if position_bias is not None or (queries > 1 and softcap is None):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    # The heads of a group, and their queries, one below the other: (B, H/groups, groups * Q, D).
    query = (query * (scaling if scaling is not None else size**-0.5)).reshape(rows, key.shape[1], -1, size)
    columns = key.shape[2]
    if queries > 1:
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, queries, columns, dtype=torch.bool, device=query.device).tril()
        blocks = [_Block(0, rows, 0, attention_mask)]
    else:
        blocks = [_Block(0, rows, 0, attention_mask)] if ragged_rows is None else ragged_rows.blocks(columns)
    if len(blocks) == 1:
        mixed = _attend(query, key, value, blocks[0], softcap)
    else:
        mixed = query.new_empty(*query.shape[:3], value.shape[-1])
        for block in blocks:
            mixed[block.first : block.last] = _attend(query, key, value, block, softcap)
    return mixed.view(rows, heads, queries, -1).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, block: _Block, softcap: float | None) -> Tensor:
    """Return the attention of a block's rows, ``(rows, shared heads, M, D)``."""
    query = query[block.first : block.last]
    key, value = (states[block.first : block.last, :, block.start :].flatten(0, 1) for states in (key, value))
    scores = torch.bmm(query.flatten(0, 1), key.transpose(1, 2))
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if block.mask is not None:
        # The lowest number, not minus infinity: a padding query sees no key at all, and must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        by_query = scores.view(*query.shape[:2], -1, block.mask.shape[2], scores.shape[-1])
        by_query.masked_fill_(~block.mask[:, :, None], lowest)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).view(*query.shape[:3], -1)


def takes_own_attention(model: Any) -> bool:
    """Return whether a model would use the library's SDPA and lets it be replaced."""
    config = model.config.get_text_config(decoder=True)
    return config._attn_implementation == "sdpa" and bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let a model that would use the library's SDPA use :func:`decode_attention` within the block."""
    if not takes_own_attention(model):
        yield
        return
    config = model.config.get_text_config(decoder=True)
    config._attn_implementation = DECODE_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, sdpa_mask)
