"""LoRA adapters: added before training, merged after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Wrap a model with new LoRA adapters; their product is zero, so the policy initially equals the reference.

    Raises:
        InputError: peft is not installed.
    """
    import importlib.util

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
