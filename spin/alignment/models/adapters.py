"""LoRA adapters: added before training, merged after training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import read_json
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.models.weights_check import meta_model, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Wrap a model with new LoRA adapters; their product is zero, so the policy initially equals the reference.

    Raises:
        InputError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("use_peft needs the peft package: pip install 'selfplay-spin[peft]'")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit or config.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,  # the policy must equal the reference at step 0
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def check_adapter(folder: Path, model_folder: Path, model_config: Any, trust_remote_code: bool = False) -> None:
    """Check from headers alone that a saved LoRA adapter has exactly the weights that it needs on a model.

    Without peft (vLLM applies adapters without it), only the files are checked.

    Raises:
        InputError: a file is damaged, the adapter is of another type, or its weights do not fit the model.
    """
    values = read_json(folder / "adapter_config.json")
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise InputError(
            f"the adapter in {folder} is of type {kind}, but only LORA is supported: merge it into the model first"
        )
    stored = {name: tuple(tensor.shape) for name, tensor in read_header(folder / "adapter_model.safetensors").items()}
    model = meta_model(model_folder, model_config, "causal", trust_remote_code)
    if model is None or importlib.util.find_spec("peft") is None:
        return
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
        wanted = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(adapted).items()}
    except Exception as error:  # peft raises its own kinds for each setting that it cannot apply
        raise InputError(
            f"the adapter in {folder} does not fit the model ({reason_of(error)}): give the model it was trained on"
        ) from error
    differing = sorted(name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise InputError(
            f"the adapter in {folder} does not fit the model ({name} has the shape {stored.get(name, 'of no weight')}, but the "
            f"model takes {wanted.get(name, 'no such weight')}): give the model it was trained on"
        )


def merge_adapters(model: Any, state_dict: dict[str, Any], config: ModelConfig) -> PreTrainedModel:
    """Return the base model with the trained adapters merged into its weights.

    The base model is reloaded on the CPU, in float32 and not quantised: merging into 16-bit or 4-bit weights would round
    the update away, and under ZeRO-3 or FSDP no process has the full base model. ``state_dict`` is the gathered state of the
    adapted model.
    """
    from dataclasses import replace

    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Only one process merges: loading into ZeRO-3 partitions is a collective operation and would hang.
    unset_hf_deepspeed_config()
    adapters = get_peft_model_state_dict(model, state_dict=state_dict)
    base = load_model(replace(config, dtype="float32", load_in_4bit=False, load_in_8bit=False))
    adapted = get_peft_model(base, model.peft_config["default"])
    outcome = set_peft_model_state_dict(adapted, adapters)
    if outcome.unexpected_keys:
        raise RuntimeError(f"adapter weights that the base model does not have: {outcome.unexpected_keys[:3]}")
    return adapted.merge_and_unload()
