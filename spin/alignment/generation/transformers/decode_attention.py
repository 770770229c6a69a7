"""Attention of one new token per row against a cache, registered with transformers' attention interface.

The library's SDPA reads the padding of every row, repeats the keys and values of grouped heads in every step, and ignores
soft caps. Here each row's keys are read in place, starting at the row's first column, and the query heads of a group are rows
of a single matrix product with the keys that they share.

Shapes: B rows, H query heads, Q queries (1 when decoding), T columns, D head size.
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
# Bytes of keys and values that one CPU core reads in the time that launching another product takes: 24 us at 7 GB/s.
_BYTES_PER_CALL = 168_000


class _Block(NamedTuple):
    """Neighbouring rows ``first`` to ``last``, the first column that any of them sees, and which see which columns.

    ``mask`` has a shape that broadcasts to ``(rows, 1, Q, T)``; None if all rows see all columns.
    """

    first: int
    last: int
    start: int
    mask: Tensor | None


class RaggedRows:
    """The number of padding columns before each row, shared by all layers of a step."""

    def __init__(self, padding: Sequence[int], device: torch.device, column_bytes: int) -> None:
        """Join neighbouring rows into blocks where reading their padding costs less than another call.

        ``column_bytes`` is the size of one row's keys and values in one column of one layer.
        """
        worth = _BYTES_PER_CALL / column_bytes if device.type == "cpu" else float("inf")
        self._blocks = _join_neighbours(padding, worth)
        # (B, 1, 1, 1) on the device; the copy on the host saves a synchronisation per layer.
        self._padding, self._host = torch.tensor(padding, device=device)[:, None, None, None], padding
        self._made: dict[int, list[_Block]] = {}
        self._width = 0
        self.uses = 0

    def begin(self, width: int) -> None:
        """Begin a step over ``width`` columns, including the new one."""
        self._width = width
        self._made.clear()

    def blocks(self, columns: int) -> list[_Block]:
        """Return the blocks for a layer that has the last ``columns`` columns (fewer than the width if it has a window)."""
        self.uses += 1
        if columns not in self._made:
            self._made[columns] = [self._block(first, last, self._width - columns) for first, last in self._blocks]
        return self._made[columns]

    def _block(self, first: int, last: int, dropped: int) -> _Block:
        padding = self._host[first:last]
        start = max(0, min(padding) - dropped)
        if max(padding) <= dropped + start:
            return _Block(first, last, start, None)
        places = torch.arange(dropped + start, self._width, device=self._padding.device)  # (T,)
        return _Block(first, last, start, places >= self._padding[first:last])  # (rows, 1, 1, T)


def _join_neighbours(padding: Sequence[int], worth: float) -> list[tuple[int, int]]:
    """Return (first, last) of blocks of rows; a block ends before it would read more than ``worth`` columns of padding."""
    # A block reads from its least padded row on; ``wasted`` counts the columns of padding read in the other rows.
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

    ``ragged_rows`` is passed as a keyword argument of the model's forward and replaces the mask, which otherwise is True where a
    query sees a key, shape ``(B, 1, Q, T)``, or None for causal. A prefill is left to the library unless scores are capped.
    """
    rows, heads, queries, size = query.shape
    if position_bias is not None or (queries > 1 and softcap is None):
        kwargs |= {"scaling": scaling, "position_bias": position_bias}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    # The heads of a group and their queries, stacked: (B, H/groups, groups * Q, D).
    query = (query * (scaling if scaling is not None else size**-0.5)).reshape(rows, key.shape[1], -1, size)
    columns = key.shape[2]
    if queries > 1:
        if attention_mask is None:
            # (1, 1, Q, T); Q = T, because a prefill starts with an empty cache
            attention_mask = torch.ones(1, 1, queries, columns, dtype=torch.bool, device=query.device).tril()
        blocks = [_Block(0, rows, 0, attention_mask)]
    else:
        blocks = [_Block(0, rows, 0, attention_mask)] if ragged_rows is None else ragged_rows.blocks(columns)
    if len(blocks) == 1:
        mixed = _attend(query, key, value, blocks[0], softcap)
    else:
        mixed = query.new_empty(*query.shape[:3], value.shape[-1])  # (B, H/groups, groups * Q, D)
        for block in blocks:
            mixed[block.first : block.last] = _attend(query, key, value, block, softcap)
    return mixed.view(rows, heads, queries, -1).transpose(1, 2), None  # (B, Q, H, D)


def _attend(query: Tensor, key: Tensor, value: Tensor, block: _Block, softcap: float | None) -> Tensor:
    """Return the attention of a block's rows, ``(rows, H/groups, M, D)`` with M = groups * Q."""
    query = query[block.first : block.last]  # (rows, H/groups, M, D)
    if softcap is None and query.device.type == "cpu":
        return _attend_on_cpu(query, key, value, block)
    # (rows * H/groups, T, D) each
    key, value = (states[block.first : block.last, :, block.start :].flatten(0, 1) for states in (key, value))
    scores = torch.bmm(query.flatten(0, 1), key.transpose(1, 2))  # (rows * H/groups, M, T)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if block.mask is not None:
        # The lowest finite number instead of -inf: a padding query sees no key, and its softmax must not be NaN.
        lowest = torch.finfo(scores.dtype).min
        # (rows, H/groups, groups, Q, T), a view
        by_query = scores.view(*query.shape[:2], -1, block.mask.shape[2], scores.shape[-1])
        by_query.masked_fill_(~block.mask[:, :, None], lowest)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).view(*query.shape[:3], -1)


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, block: _Block) -> Tensor:
    """Return the same from torch's flash kernel, which reads keys and values in place.

    A batched product would copy them in 16 bits, because they are views of the cache: two to four times slower.
    """
    # (rows, H/groups, T, D) each, views
    key, value = (states[block.first : block.last, :, block.start :] for states in (key, value))
    mask = None if block.mask is None else block.mask.expand(-1, -1, query.shape[2], -1)  # (rows, 1, M, T)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def supports_decode_attention(model: Any) -> bool:
    """Return whether a model uses the library's SDPA and allows it to be replaced."""
    config = model.config.get_text_config(decoder=True)
    return config._attn_implementation == "sdpa" and bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Make a model that uses the library's SDPA use :func:`decode_attention` within the ``with`` block."""
    if not supports_decode_attention(model):
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
