"""A key-value cache that grows in place, and whose rows can join and leave while the others continue.

All rows end at the same column: a row of ``n`` tokens occupies the last ``n`` of the cache's ``width`` columns, and those before
are masked. A step therefore writes one column for all rows, distances within a row are those of the sequence (so causal and
windowed masks apply unchanged), and a new row joins by being copied so that it ends there too. Columns that no row needs any
longer are dropped by advancing the start; nothing is copied until the end of a buffer is reached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from spin.alignment.core.errors import InputError

_LAYERS_SERVED = {"full_attention", "sliding_attention"}
# Free columns at the end of a reallocated buffer: at least 64, or a quarter of its width, so that copies are amortised.
_SPARE_COLUMNS, _SPARE_SHARE = 64, 4


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer: views ``[:rows, :, start:end]`` of buffers of shape ``(rows, heads, columns, head size)``.

    A layer with a ``window`` keeps at most the last ``window - 1`` columns between two forward passes.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.rows = self.width = self.start = self.end = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Use the states of a prefill as the buffers, without copying them."""
        self.buffers = (key_states, value_states)
        self.rows, self.end = key_states.shape[0], key_states.shape[2]
        self.start, self.width = 0, self.end
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states of shape ``(rows, heads, new columns, head size)``; return all those that the new columns may see.

        Under autocast they are stored in its precision, to which every step would otherwise convert all of them.
        """
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        new = key_states.shape[2]
        self.width += new
        self._reserve(0, new)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.end : self.end + new] = states
        self.end += new
        # (rows, heads, held + new, head size), views
        keys, values = (buffer[: self.rows, :, self.start : self.end] for buffer in self.buffers)
        self._forget()
        return keys, values

    def _forget(self) -> None:
        """Drop the columns that no later token can see."""
        held = self.width if self.window is None else min(self.width, self.window - 1)
        self.start = self.end - held

    def _reserve(self, left: int, right: int, rows: int = 0) -> None:
        """Ensure capacity for ``left`` columns before and ``right`` columns after the current ones, and for ``rows`` rows."""
        assert self.buffers is not None
        have_rows, heads, columns, _ = self.buffers[0].shape
        if self.start >= left and self.end + right <= columns and rows <= have_rows:
            return
        held = self.end - self.start
        need = left + held + right
        columns = need + max(_SPARE_COLUMNS, need // _SPARE_SHARE)
        made = []
        for buffer in self.buffers:
            larger = buffer.new_empty(max(rows, have_rows), heads, columns, buffer.shape[3])
            larger[: self.rows, :, left : left + held] = buffer[: self.rows, :, self.start : self.end]
            made.append(larger)
        self.buffers = (made[0], made[1])
        self.start, self.end = left, left + held

    def join(self, other: RowLayer, chosen: Tensor | None, count: int, most: int) -> None:
        """Append ``count`` rows of ``other``, those with the indices ``chosen`` (None: all); ``most`` limits the rows."""
        assert other.buffers is not None
        if self.buffers is None:
            first, second = (buffer.new_zeros(0, buffer.shape[1], 0, buffer.shape[3]) for buffer in other.buffers)
            self.lazy_initialization(first, second)
        assert self.buffers is not None
        have_rows, _, columns, _ = self.buffers[0].shape
        if not self.rows:  # empty again: the new rows reuse the buffers from their first column
            self.width = 0
            self.start = self.end = min(columns, other.width)
        self.width = max(self.width, other.width)
        wanted = self.width if self.window is None else min(self.width, self.window - 1)
        rows = self.rows + count
        # Doubling amortises the copies, but never beyond ``most`` rows.
        self._reserve(
            wanted - (self.end - self.start), 0, rows if rows <= have_rows else max(rows, min(2 * have_rows, most))
        )
        held, before = min(wanted, other.width), self.start
        self.start = self.end - wanted
        for buffer, joining in zip(self.buffers, other.buffers, strict=True):
            # Zeros instead of uninitialised memory: a masked column has weight 0, but 0 times NaN is NaN.
            buffer[: self.rows, :, self.start : before] = 0
            buffer[self.rows : rows, :, self.start : self.end - held] = 0
            states = joining[: other.rows, :, other.end - held : other.end]  # (other.rows, heads, held, head size)
            states = states if chosen is None else states.index_select(0, chosen)
            buffer[self.rows : rows, :, self.end - held : self.end] = states
        self.rows = rows

    def move(self, sources: Tensor, targets: Tensor, rows: int) -> None:
        """Copy the rows ``sources`` to ``targets``, then keep the first ``rows``."""
        assert self.buffers is not None
        if len(sources):
            for buffer in self.buffers:
                view = buffer[:, :, self.start : self.end]
                view[targets] = view[sources]
        self.rows = rows

    def trim(self, columns: int) -> None:
        """Drop the first columns, which are padding in every row."""
        self.width -= columns
        self._forget()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns the next forward pass sees, and how many precede the first of them."""
        held = self.end - self.start
        return held + query_length, self.width - held

    def get_seq_length(self) -> int:
        """Return the number of columns of the cache, including those that a window has dropped."""
        return self.width

    def get_max_length(self) -> int:
        """Return -1: only memory limits the number of columns."""
        return -1


class RowCache(Cache):
    """The cache of all layers of a model."""

    layers: list[RowLayer]

    def __init__(self, windows: list[int | None]) -> None:
        super().__init__(layers=[RowLayer(window) for window in windows])

    @property
    def width(self) -> int:
        """Number of columns, padding included."""
        return self.layers[0].width

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.layers[0].rows

    @property
    def column_bytes(self) -> int:
        """Bytes of one row's keys and values in one column of the first layer."""
        buffers = self.layers[0].buffers or ()
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in buffers)

    def join(self, other: RowCache, chosen: list[int], most: int) -> None:
        """Append the ``chosen`` rows of a prefilled cache, in which an index may be repeated; ``most`` limits the rows."""
        same = chosen == list(range(other.rows))
        index = None if same else torch.tensor(chosen, device=self._device(other))
        for own, others in zip(self.layers, other.layers, strict=True):
            own.join(others, index, len(chosen), most)

    def keep(self, kept: list[int]) -> list[int]:
        """Keep only the ``kept`` rows; return them in their new order, in which the last rows fill the holes."""
        count = len(kept)
        order = list(range(count))
        holes = sorted(set(order) - set(kept))
        fillers = [row for row in kept if row >= count]
        for hole, filler in zip(holes, fillers, strict=True):
            order[hole] = filler
        sources, targets = (
            torch.tensor(rows, dtype=torch.long, device=self._device(self)) for rows in (fillers, holes)
        )
        for layer in self.layers:
            layer.move(sources, targets, count)
        return order

    def trim(self, columns: int) -> None:
        """Drop the first columns, which are padding in every row."""
        if columns:
            for layer in self.layers:
                layer.trim(columns)

    @staticmethod
    def _device(cache: RowCache) -> torch.device:
        return cache.layers[0].device


def layer_windows(model: Any) -> list[int | None]:
    """Return the attention window of each layer in tokens, None for full attention.

    Raises:
        InputError: the model has state other than keys and values by position.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    fix = "use --backend vllm"
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        kind = "an encoder" if model.config.is_encoder_decoder else "a recurrent state"
        raise InputError(f"{name} has {kind}, which the transformers backend does not support: {fix}")
    kinds, settings = get_layer_types_and_kwargs(config)
    unknown = sorted(set(kinds) - _LAYERS_SERVED)
    if unknown or getattr(config, "num_kv_shared_layers", None):
        what = f"layers of kind {', '.join(unknown)}" if unknown else "layers that share a cache"
        raise InputError(f"{name} has {what}, which the transformers backend does not support: {fix}")
    return [setting.get("sliding_window") for setting in settings]
