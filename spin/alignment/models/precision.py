"""Precision of weights: in memory, during training, and when saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    import torch


def resolve_dtype(name: str) -> torch.dtype | str:
    """Return the torch dtype with a name; ``auto`` is returned unchanged.

    Raises:
        InputError: the device does not support it.
    """
    import torch

    if name == "auto":
        return "auto"
    if torch.cuda.is_available() and name == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise InputError("dtype bfloat16 is not supported by this GPU: set dtype to float16 or float32")
    # Many CPU kernels do not support float16.
    if name == "float16" and not torch.cuda.is_available():
        raise InputError("dtype float16 needs a GPU: set dtype to bfloat16 or float32")
    return getattr(torch, name)


def weight_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter by name, in which the checkpoint will be saved."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def keep_master_weights(model: torch.nn.Module) -> None:
    """Convert trainable 16-bit parameters to float32; with mixed precision the computation still runs in 16 bits.

    A step of 5e-7 on a weight of 0.02 is far below the spacing of bfloat16 there (1e-4) and would be rounded away.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
