"""Linear layers with weights in the layout of oneDNN's kernels, for decoding on a CPU.

A matrix product with the few rows of a decoding step spends a third of its time rearranging its weight for the kernel (bfloat16,
AMX). The weights do not change while responses are generated, so they are rearranged once, as ``torch.compile`` does when it
freezes a model; the model keeps its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

# A smaller weight costs more to hand over to oneDNN than the rearrangement saves.
_SMALLEST_WEIGHT = 2**16
# Rows that the layout is chosen for; other numbers of rows run equally fast with it.
_TYPICAL_ROWS = 64
# The packed copy may take this share of the free memory; a model too large for it runs with its own weights.
_MEMORY_SHARE = 0.25
_PRECISIONS = (torch.bfloat16, torch.float32)


class PackedLinears:
    """The packed weights of one model, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        """Pack the linear layers in the precision in which they compute: that of autocast, otherwise their own.

        Nothing is packed, and :meth:`applied` changes nothing, for a model on a GPU, in another precision, or without memory
        for the copy.
        """
        self._forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _can_pack(layer)]
        size = sum(layer.weight.numel() * _precision(layer).itemsize for layer in layers)
        if size <= _MEMORY_SHARE * psutil.virtual_memory().available:
            self._forwards = {layer: _packed_forward(layer) for layer in layers}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the packed weights within the ``with`` block."""
        for layer, forward in self._forwards.items():
            layer.forward = forward  # type: ignore[method-assign]  # of this instance, hiding that of the class
        try:
            yield
        finally:
            for layer in self._forwards:
                del layer.forward  # type: ignore[method-assign]


def _can_pack(layer: nn.Linear) -> bool:
    """Return whether a layer has an ordinary weight, on a CPU, in a precision and of a size that gain from packing."""
    weight = layer.weight
    return (
        type(weight) is nn.Parameter  # neither a shard nor quantised
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and weight.numel() > _SMALLEST_WEIGHT
        and "forward" not in vars(layer)  # replaced by someone else
        and _precision(layer) in _PRECISIONS
    )


def _precision(layer: nn.Linear) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return the forward of a layer with a packed copy of its weight: ``(..., inputs)`` -> ``(..., outputs)``."""
    # Private operators of torch: they have existed since 1.13 and are what its compiler emits.
    operators: Any = torch.ops.mkldnn
    dtype = _precision(layer)
    weight = operators._reorder_linear_weight(layer.weight.detach().to(dtype), _TYPICAL_ROWS)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(states: Tensor) -> Tensor:
        output: Tensor = operators._linear_pointwise(states.to(dtype), weight, bias, "none", [], "")
        return output

    return forward
