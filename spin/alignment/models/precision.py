"""Precision of weights: in memory, during training, and when saved."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


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


def prepare_precision(model: torch.nn.Module, arguments: Any) -> None:
    """Give the trained weights a float32 copy under ``bf16`` or ``fp16``, and warn where 16-bit weights have none.

    Under DeepSpeed do nothing: it keeps the copies itself, in shards.
    """
    if arguments.deepspeed_plugin is not None:
        return
    if arguments.bf16 or arguments.fp16:
        keep_master_weights(model)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters() if parameter.requires_grad):
        logger.warning(
            "warning: the trained weights have 16 bits and no float32 copy, so steps below about 0.4%% of a weight are lost: "
            "set bf16: true (mixed precision) or dtype: float32"
        )
