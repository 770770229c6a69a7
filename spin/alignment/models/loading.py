"""Loading a causal language model: precision, quantisation, dropout disabled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_model_path, model_folder, read_config_file
from spin.alignment.models.library_output import name_accelerator, without_progress_bars
from spin.alignment.models.precision import resolve_dtype
from spin.alignment.models.weights_check import check_model, refuse_mismatch, validate_generation_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(config: ModelConfig, seed: int = 42) -> PreTrainedModel:
    """Load a causal language model with dropout disabled, without adapters (see :func:`add_adapters`).

    With ``init_from_config`` the weights are initialised at random with ``seed`` instead.

    Raises:
        InputError: the folder is damaged, or weights are missing, unexpected or of another shape than its config.json describes.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    name_accelerator()
    check_model_path(config.model_name_or_path, needs_weights=not config.init_from_config)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        common["attn_implementation"] = config.attn_implementation
    name, revision, dtype = config.model_name_or_path, config.model_revision, resolve_dtype(config.dtype)
    if config.init_from_config:
        folder = model_folder(name, revision)
        model_config = check_model(folder, trust_remote_code=config.trust_remote_code, needs_weights=False)
        torch.manual_seed(seed)  # every process must draw the same weights
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32 if dtype == "auto" else dtype, **common
        )
    else:
        quantised = quantisation(config)
        folder = model_folder(name, revision)
        if quantised is not None:
            common["quantization_config"] = quantised
        else:
            _check_stored_quantisation(folder)
        # Reported instead of raised, so that a weight of the wrong shape is refused like a missing one. ZeRO-3 reports none.
        common["ignore_mismatched_sizes"] = not is_deepspeed_zero3_enabled()
        with without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
            )
        refuse_mismatch(folder, report, quantised="quantization_config" in read_config_file(folder))
        if config.load_in_4bit:
            _keep_differentiable(model)
    disable_dropout(model)
    if getattr(model, "generation_config", None) is not None:
        validate_generation_config(model.generation_config)
    return model


def quantisation(config: ModelConfig) -> Any:
    """Return the quantisation to load a model with, as transformers takes it; None for none.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need bitsandbytes: pip install 'selfplay-spin[qlora]'")
    import torch
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _check_stored_quantisation(folder: Path) -> None:
    """Check that transformers can load the quantisation that a model was saved with, if it was: its kind, package and device.

    Raises:
        InputError: it cannot.
    """
    settings = read_config_file(folder).get("quantization_config")
    if settings is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment()
    except Exception as error:  # each kind raises its own
        raise InputError(
            f"the quantised weights of {folder} cannot be loaded here ({reason_of(error)}): install what is missing, or use "
            "the model that is not quantised"
        ) from error


def _keep_differentiable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of a model, so that it can be trained after an evaluation.

    On a CPU with AVX-512 bf16 a layer that passes a batch in evaluation mode repacks its weights for a faster kernel, for good.
    That kernel has no backward pass (autograd takes its output for a constant, so the layers below lose their gradients), and
    it takes only layers of at least a quantisation block (64).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: the policy must equal the reference at step 0, and log-probs must match those of generation."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Functional dropout takes its rate from the module (attention_dropout, dropout, layerdrop) or from the config.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
                    setattr(holder, name, 0.0)
