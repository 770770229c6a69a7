"""Attention over packed rows, registered with transformers' attention interface, so no model code is patched.

A packed row contains several *trees*, one after another. A tree is a prompt P and its branches B1, B2 ... (the responses): P
followed by B1 is an ordinary sequence, and every further branch attends to P and to itself, never to another branch. No
``T x T`` mask is built on the paths used for training.

Shapes: T tokens in the row, H query heads, KV key-value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.cpu_attention import Segment, SegmentAttention

if TYPE_CHECKING:
    from torch import Tensor

PACKED_ATTENTION = "spin_packed"
PADDED_FIX = "set batching: padded (slower, the same loss)"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Tree:
    """Lengths, in tokens, of a prompt and of the branches that continue it."""

    prompt: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.branches)


@dataclass
class PackedLayout:
    """The trees of one packed row; the index tensors of the kernels are built once per row and shared by all layers."""

    trees: Sequence[Tree]
    device: torch.device
    kernel: str = "sdpa"
    _masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def query_lengths(self) -> list[int]:
        """Lengths of the query segments: the prompt with the first branch, then each further branch."""
        return [n for tree in self.trees for n in (tree.prompt + tree.branches[0], *tree.branches[1:])]

    @cached_property
    def segment_lengths(self) -> list[int]:
        """Lengths of the row's pieces: prompt, first branch, further branches, next prompt, and so on."""
        return [n for tree in self.trees for n in (tree.prompt, *tree.branches)]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Number of keys that each query segment attends to: those of the prompt and of its own branch."""
        return [tree.prompt + branch for tree in self.trees for branch in tree.branches]

    @cached_property
    def segments(self) -> list[Segment]:
        """The query segments with the places of their keys in the row."""
        found, start = [], 0
        for tree in self.trees:
            prompt = slice(start, start + tree.prompt)
            branch_start = prompt.stop
            for number, length in enumerate(tree.branches):
                branch = slice(branch_start, branch_start + length)
                found.append(Segment(branch if number else slice(start, branch.stop), (prompt, branch)))
                branch_start = branch.stop
            start += tree.tokens
        return found

    @cached_property
    def key_index(self) -> Tensor:
        """Positions in the row of the keys of all query segments, shape ``(sum of key_lengths,)``."""
        pieces, start = [], 0
        for tree in self.trees:
            branch_start = start + tree.prompt
            for branch in tree.branches:
                pieces += [torch.arange(start, start + tree.prompt), torch.arange(branch_start, branch_start + branch)]
                branch_start += branch
            start += tree.tokens
        return torch.cat(pieces).to(self.device)

    @cached_property
    def cumulative_lengths(self) -> tuple[Tensor, Tensor]:
        """Cumulative query and key lengths, int32, shape ``(segments + 1,)``, as variable-length kernels expect them."""
        both = (self.query_lengths, self.key_lengths)
        first, second = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=self.device) for n in both)
        return first, second

    @cached_property
    def token_marks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tree, branch (0: the prompt) and position of every token, int32 of shape ``(T,)``."""
        marks = [
            (number, branch, offset + (tree.prompt if branch else 0))
            for number, tree in enumerate(self.trees)
            for branch, length in enumerate((tree.prompt, *tree.branches))
            for offset in range(length)
        ]
        trees, branches, positions = torch.tensor(marks, dtype=torch.int32, device=self.device).unbind(dim=1)
        return trees, branches, positions

    def causal_mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the additive mask, shape ``(queries, keys)``, for queries that are the last of the keys.

        A query sees itself and earlier keys; with a window, only the last ``window`` keys.
        """
        name = (queries, keys, window, dtype)
        if name not in self._masks:
            distance = torch.arange(keys - queries, keys, device=self.device)[:, None] - torch.arange(
                keys, device=self.device
            )
            # distance: (queries, keys), from key to query, negative for future keys
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[name] = torch.zeros(queries, keys, dtype=dtype, device=self.device).masked_fill_(
                hidden, float("-inf")
            )
        return self._masks[name]

    @cached_property
    def _block_masks(self) -> dict[int | None, Any]:
        return {}

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's block mask for the row."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            trees, branches, positions = self.token_marks

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                same = (trees[query] == trees[key]) & ((branches[key] == 0) | (branches[key] == branches[query]))
                distance = positions[query] - positions[key]
                seen = same & (distance >= 0)
                return seen if window is None else seen & (distance < window)

            tokens = len(positions)
            self._block_masks[window] = create_block_mask(visible, None, None, tokens, tokens, device=str(self.device))
        return self._block_masks[window]


@dataclass(frozen=True)
class AttentionCall:
    """The attention settings of one layer: the scale of the scores, the window (in keys) and the soft cap, or None."""

    scaling: float | None
    window: int | None
    softcap: float | None


# A kernel takes query (1, H, T, D), key and value (1, KV, T, D) and returns the attended values as (1, T, H, D).
Kernel = Callable[["Tensor", "Tensor", "Tensor", PackedLayout, AttentionCall], "Tensor"]


def sdpa_kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall) -> Tensor:
    """Attend segment by segment with PyTorch's scaled dot-product attention; soft-capped scores are materialised.

    On a CPU the gradient of plain attention in 16 bits is computed by :class:`SegmentAttention`.
    """
    attend = partial(_attend_segments, layout=layout, call=call)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = call.softcap is None and (call.window is None or call.window >= max(layout.key_lengths))
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and plain and differentiated:
        states = (some.to(dtype) for some in (query, key, value))
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        return SegmentAttention.apply(*states, layout.segments, scale, attend)
    return attend(query, key, value)


def _attend_segments(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall) -> Tensor:
    # split and cat have cheap gradients; the gradient of a slice is a whole row of zeros.
    keys, values = (piece.split(layout.segment_lengths, dim=2) for piece in (key, value))  # pieces (1, KV, length, D)
    grouped = query.shape[1] != key.shape[1]
    outputs, segment, piece = [], iter(query.split(layout.query_lengths, dim=2)), 0
    for tree in layout.trees:
        for branch in range(1, len(tree.branches) + 1):
            part = next(segment)  # (1, H, Q, D)
            k = torch.cat([keys[piece], keys[piece + branch]], dim=2)  # (1, KV, prompt + branch, D)
            v = torch.cat([values[piece], values[piece + branch]], dim=2)
            outputs.append(_attend(part, k, v, layout, call, grouped))
        piece += 1 + len(tree.branches)
    return torch.cat(outputs, dim=2).transpose(1, 2)  # (1, T, H, D)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall, grouped: bool
) -> Tensor:
    """Attend from queries ``(1, H, Q, D)`` to keys ``(1, KV, K, D)``, of which the queries are the last Q; ``(1, H, Q, D)``."""
    queries, keys = query.shape[2], key.shape[2]
    window = None if call.window is None or call.window >= keys else call.window
    if call.softcap is not None:
        mask = layout.causal_mask(queries, keys, window, torch.float32)
        return _softcapped(query, key, value, mask, call)
    settings: dict[str, Any] = {"scale": call.scaling, "enable_gqa": grouped}
    # is_causal aligns the diagonal to the first key, so it only fits a prompt with its first branch (queries == keys).
    if queries == keys and window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    mask = layout.causal_mask(queries, keys, window, query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (call.scaling if call.scaling is not None else query.shape[-1] ** -0.5)
    assert call.softcap is not None
    scores = torch.tanh(scores / call.softcap) * call.softcap + mask  # (1, H, Q, K)
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype) @ value


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall) -> Tensor:
    """Attend with one variable-length flash-attention call; the prompt's keys are gathered once per branch.

    Raises:
        InputError: the layer caps its scores, which the kernel does not support.
    """
    if call.softcap is not None:
        raise InputError("packed_attention varlen cannot cap attention scores: set packed_attention: flex")
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 passes grouped heads to the same kernel without asking for ``enable_gqa``, which only checks their numbers.
    announces = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if announces else {}
    # The kernel aligns the causal diagonal to the last key, which is right because queries are the last of their keys.
    index, (queries, keys) = layout.key_index, layout.cumulative_lengths
    attended = varlen_attn(
        query[0].transpose(0, 1),  # (T, H, D)
        key[0].index_select(1, index).transpose(0, 1),  # (sum of key lengths, KV, D)
        value[0].index_select(1, index).transpose(0, 1),
        queries,
        keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=call.scaling,
        window_size=(-1 if call.window is None else call.window - 1, 0),
        **grouped,
    )
    return attended.unsqueeze(0)  # (1, T, H, D)


def flex_kernel(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, call: AttentionCall) -> Tensor:
    """Attend with FlexAttention: fully masked blocks are skipped, soft caps are applied inside the kernel."""
    cap = call.softcap

    def score(value: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        assert cap is not None
        return torch.tanh(value / cap) * cap

    attended = _flex_attention(query.device.type)(
        query,
        key,
        value,
        score_mod=None if cap is None else score,
        block_mask=layout.block_mask(call.window),
        scale=call.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2)


@cache
def _flex_attention(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation it materialises the scores, which is good enough to test the mask on a CPU.
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


KERNELS: dict[str, Kernel] = {
    "flex": flex_kernel,
    "sdpa": sdpa_kernel,
    "varlen": varlen_kernel,
}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query ``(1, H, T, D)`` -> ``(1, T, H, D)``.

    ``layout`` is passed as a keyword argument of the model's forward. ``attention_mask`` is ignored.

    Raises:
        InputError: the layer has attention sinks, which no packed kernel supports.
    """
    if s_aux is not None:
        raise InputError(
            f"{type(module).__name__} uses attention sinks, which packed rows do not support: {PADDED_FIX}"
        )
    call = AttentionCall(scaling, sliding_window, softcap)
    return KERNELS[layout.kernel](query, key, value, layout, call), None


def register() -> None:
    """Register ``PACKED_ATTENTION`` with transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def check_architecture(model: Any) -> None:
    """Check whether a model's configuration permits packed rows; a later comparison of log-probs covers the rest.

    Raises:
        InputError: the model's attention cannot be replaced, or a layer is not plain attention.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        raise InputError(
            f"{name} has layers of type {', '.join(unknown)}, which packed rows do not support: {PADDED_FIX}"
        )
    if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{name} does not allow its attention to be replaced, so rows cannot be packed: {PADDED_FIX}")


def choose_kernel(model: Any, device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> str:
    """Return the name of the fastest kernel that supports the model on a device in a compute dtype, or the ``wanted`` one.

    Raises:
        InputError: the wanted kernel is not supported here.
    """
    config = model.config.get_text_config()
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    half = dtype in (torch.bfloat16, torch.float16)
    reasons = {  # why a kernel cannot be used, fastest first
        "varlen": None
        if device.type == "cuda" and half and not softcap
        else "it needs a GPU, 16-bit precision and scores without a soft cap",
        "flex": None if device.type == "cuda" else "it has no gradient on a CPU",
        "sdpa": None,
    }
    if wanted != "auto":
        if reasons[wanted]:
            raise InputError(f"packed_attention is {wanted}, but {reasons[wanted]}: set packed_attention: auto")
        return wanted
    return next(name for name, reason in reasons.items() if reason is None)
