"""Precision of weights: in memory, during training, and when saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.models.config import Dtype
from spin.alignment.models.folder import model_folder

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Weights of a model from this size on (50 million parameters in float32) take long enough for its precision to matter.
_LARGE_BYTES = 200 * 10**6

# Key in config.json of a float32 checkpoint: the 16-bit precision that the model computed in while it was trained.
TRAINED_IN = "trained_in_dtype"


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


def training_dtype(dtype: Dtype, arguments: Any, adapters: bool = False) -> Dtype:
    """Return the ``dtype`` in which to load the weights that will be trained under some TrainingArguments.

    With mixed precision they are kept in float32, and are loaded as such: loading float32 weights in 16 bits first would round
    away what earlier iterations have learned. Under DeepSpeed, which makes the float32 copies itself, and with ``adapters``,
    whose base model is not trained, it is the configured one.
    """
    keeps_masters = (arguments.bf16 or arguments.fp16) and arguments.deepspeed_plugin is None
    return "float32" if keeps_masters and not adapters else dtype


def compute_name(arguments: Any) -> Dtype | None:
    """Return the 16-bit precision of mixed-precision training; None without it."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None


def generation_dtype(model: str, dtype: Dtype) -> Dtype:
    """Return the precision in which to generate from or score with a model whose ``dtype`` is configured.

    ``auto`` is that of the checkpoint. A float32 checkpoint of mixed-precision training (see ``save_dtype``) is used in the 16
    bits that it computed in during training: its float32 weights are for the next iteration's training.
    """
    if dtype != "auto" or not (Path(model) / "config.json").is_file():
        return dtype
    recorded = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get(TRAINED_IN, "auto")
    if recorded != "auto":
        say_error(f"{model} was saved in float32 after training in {recorded}: it is used in {recorded} (dtype: auto)")
    return cast(Dtype, recorded)


def is_faster_in_bfloat16(model: Path) -> bool:
    """Return whether a local model is computed with on a CPU that is faster in bfloat16, and large enough for that to matter."""
    if sum(file.stat().st_size for file in model.glob("*.safetensors")) < _LARGE_BYTES:
        return False  # before torch is imported
    import torch

    return has_bfloat16_instructions() and not torch.accelerator.is_available()


def has_bfloat16_instructions() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware (AVX-512, AMX or ARM's BF16); others emulate it slowly."""
    import torch

    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def machine_dtype(folder: Path, dtype: Dtype) -> Dtype | None:
    """Return the precision that this machine chooses to generate in where ``dtype`` is ``auto``; None: the checkpoint's.

    A large float32 checkpoint is used in bfloat16 by a CPU that is several times faster in it. Training and scoring are not
    affected: rounding the weights would hide what a small step has changed.
    """
    if dtype != "auto" or not (folder / "config.json").is_file():
        return None
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values.get("dtype", values.get("torch_dtype")) != "float32" or TRAINED_IN in values:
        return None
    return "bfloat16" if is_faster_in_bfloat16(folder) else None


def decoding_dtype(model: str, revision: str | None, dtype: Dtype) -> Dtype:
    """Return the precision in which to generate from a model: that of :func:`machine_dtype`, or of :func:`generation_dtype`."""
    chosen = machine_dtype(model_folder(model, revision), dtype)
    if chosen is None:
        return generation_dtype(model, dtype)
    say_error(
        f"{model} is stored in float32 and this CPU is faster in {chosen}: responses are generated in {chosen} "
        "(dtype: float32 keeps the precision of the checkpoint)"
    )
    return chosen


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
