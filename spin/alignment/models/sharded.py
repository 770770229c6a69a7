"""Weights that may be sharded (FSDP2, DeepSpeed ZeRO-3): one gathered at a time, or the part that is in this process.

A process never has more than one whole weight besides what the wrapper itself keeps. Gathering is a collective operation: every
process must do it, for the same weights in the same order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

# In the names of weights, what peft puts between a layer and the weights that it adapts, and how it begins its own.
_BASE, _LORA = "base_layer.", "lora_"


def sharding_name(arguments: Any) -> str | None:
    """Return what shards the weights of a training, before any model is loaded: FSDP1, FSDP2, DeepSpeed ZeRO-3, or None.

    ``arguments`` are TrainingArguments; a launcher may ask for FSDP through the environment as well.
    """
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    if getattr(arguments, "fsdp", None):
        return f"FSDP{(arguments.fsdp_config or {}).get('version', 2)}"
    return None


def offloads_weights(arguments: Any) -> str | None:
    """Return where sharded weights are kept while they are not used, if not on the GPU: ``cpu`` or ``nvme``."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None:
        offload = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_param") or {}
        return offload.get("device") if offload.get("device") in ("cpu", "nvme") else None
    settings = (getattr(arguments, "fsdp_config", None) or {}) if getattr(arguments, "fsdp", None) else {}
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
    return "cpu" if launched or settings.get("cpu_offload") else None


def is_sharded(model: Module) -> bool:
    """Return whether every forward pass of a module gathers weights, and is therefore a collective operation."""
    return bool(_fsdp_modules(model)) or any(hasattr(weight, "ds_id") for weight in model.parameters())


def reshard(model: Module) -> None:
    """Free the gathered copies that a wrapper has kept, so that its next forward pass gathers the weights as they are then.

    FSDP2 keeps the last layers gathered after a forward pass without a backward pass, ZeRO-3 always keeps small weights.
    """
    for module in _fsdp_modules(model):
        module.reshard()
    for weight in model.parameters():
        if hasattr(weight, "ds_id") and weight.numel() == weight.ds_numel:
            weight.partition()


def local_part(weight: Parameter) -> Tensor:
    """Return the part of a weight that is in this process, all of it if it is not sharded. Writing to it changes the weight.

    Under FSDP2 the module must have been resharded (:func:`reshard`).
    """
    if hasattr(weight, "ds_tensor"):
        return weight.ds_tensor.data
    data = weight.data
    return data.to_local() if hasattr(data, "to_local") else data


@contextlib.contextmanager
def gathered(weight: Parameter) -> Iterator[Tensor]:
    """Provide the whole of one weight, without gradient. Every process must enter and leave it."""
    if hasattr(weight, "ds_id"):
        import deepspeed  # deepspeed.zero is an attribute, not a module

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.data
        return
    data: Any = weight.data
    if hasattr(data, "full_tensor"):
        device = data.device_mesh.device_type
        # Weights offloaded to the CPU are gathered through the GPUs.
        yield (data if data.device.type == device else data.to(device)).full_tensor()
    else:
        yield data


def whole_weights(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the whole of every weight of a causal language model, LoRA adapters merged into those they adapt.

    Names are those of the model without adapters. A weight under two names (tied embeddings) comes once. A tensor is valid only
    until the next one is taken. Every process must take all of them.
    """
    reshard(model)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in causal.named_parameters():
        owner, _, own_name = name.rpartition(_BASE)
        if not owner:
            if _LORA not in name:
                with gathered(weight) as whole:
                    yield name, whole
            continue
        with gathered(weight) as whole:
            adapted = whole if own_name == "bias" else whole + _adapter_product(causal.get_submodule(owner[:-1]), whole)
            yield owner + own_name, adapted


def adapter_weights(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the whole of every weight of a model's LoRA adapter, named as peft stores it.

    A tensor is valid only until the next one is taken. Every process must take all of them.
    """
    reshard(model)
    for name, weight in model.named_parameters():
        if _LORA in name:
            with gathered(weight) as whole:
                yield name.replace(f".{model.active_adapter}.", "."), whole


def whole_linear(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return copies of the weight and the bias of a linear layer, its LoRA adapter merged, in the precision ``dtype``.

    The model must have been resharded (:func:`reshard`). Every process must call it.
    """
    base = getattr(layer, "base_layer", layer)
    with gathered(base.weight) as whole:
        weight = (whole if base is layer else whole + _adapter_product(layer, whole)).to(dtype, copy=True)
    if base.bias is None:
        return weight, None
    with gathered(base.bias) as whole:
        return weight, whole.to(dtype, copy=True)


def has_stored_names(model: Module) -> bool:
    """Return whether model folders store the weights under the names and in the shapes that the module has.

    transformers splits and renames those of some architectures when it saves them (mixtures of experts).
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    conversions = getattr(causal, "_weight_conversions", None)
    # Under ZeRO-3, transformers lists all conversions that it knows, not those that it applied.
    partitioned = any(hasattr(weight, "ds_id") for weight in causal.parameters())
    if conversions is None or partitioned:  # None: not loaded from a folder
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(causal, add_legacy=False)
    return not conversions


def _adapter_product(layer: Any, base: Tensor) -> Tensor:
    """Return what the LoRA adapter of a linear layer adds to its weight: ``scaling * B A``, in at least float32."""
    wide = torch.promote_types(base.dtype, torch.float32)
    (adapter,) = layer.active_adapters
    with gathered(layer.lora_A[adapter].weight) as down, gathered(layer.lora_B[adapter].weight) as up:
        product: Tensor = (up.to(wide) @ down.to(wide)) * layer.scaling[adapter]  # (outputs, inputs)
    return product.T if layer.fan_in_fan_out else product


def _fsdp_modules(model: Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
