"""The initial model of a trainer, given by name or as a module, and the hash that identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import load_tokenizer
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import disable_dropout, load_model
from spin.alignment.models.precision import prepare_precision, training_dtype
from spin.alignment.models.weights_hash import hash_module

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from spin.alignment.training.config import SPINConfig


def start_model(model: Any, args: SPINConfig, tokenizer: Any = None) -> tuple[torch.nn.Module, Any]:
    """Return the policy and its tokenizer: a folder or Hub name is loaded; for a module, dropout is disabled.

    Under ``bf16`` or ``fp16`` the trained weights are kept in float32, and only the computation uses 16 bits.

    If no tokenizer is given, it is loaded from the model's folder or Hub name.

    Raises:
        InputError: the model or the tokenizer does not exist.
    """
    if isinstance(model, str | Path):
        name = str(model)
        model = load_model(ModelConfig(model_name_or_path=name, dtype=training_dtype("auto", args)), args.seed)
    else:
        name = getattr(model.config, "_name_or_path", "")
        disable_dropout(model)
    prepare_precision(model, args)
    if tokenizer is None and not name:
        raise InputError("processing_class is missing, and the model has no folder to load it from: pass the tokenizer")
    return model, load_tokenizer(name) if tokenizer is None else tokenizer


def identify(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """Return a hash of a module's weights as seen by the main process. Every process must call it.

    Other processes may not have the weights yet (FSDP loads them in the main process only), or may have a different shard.
    """
    found = [hash_module(model) if accelerator.is_main_process else ""]
    return broadcast_object_list(found)[0]
