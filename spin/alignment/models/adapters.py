"""LoRA adapters: added before training, merged after training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import read_json
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.models.weights_check import meta_model, read_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What an adapter may have that inference engines do not apply, and what it is called.
_BEYOND_LORA = {"use_dora": "uses DoRA", "modules_to_save": "trains whole modules", "rank_pattern": "has several ranks"}


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


def adapter_obstacle(model: Any) -> str | None:
    """Return why inference engines cannot apply the LoRA adapter of a model next to its weights; None if they can."""
    settings = model.peft_config[model.active_adapter]
    for name, what in _BEYOND_LORA.items():
        if getattr(settings, name, None):
            return f"it {what}"
    causal = model.get_base_model()
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    for name, module in causal.named_modules():
        if hasattr(module, "lora_A") and any(module is end for end in ends):
            return f"it adapts {name}"
    return None


def adapter_config(model: Any) -> dict[str, Any]:
    """Return the entries of ``adapter_config.json`` that say how the LoRA adapter of a model is applied."""
    settings = model.peft_config[model.active_adapter]
    targets = settings.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }


def write_adapter(folder: Path, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write an adapter to an existing folder as peft stores it. ``weights`` may be valid one at a time."""
    from safetensors.torch import save_file

    save_file({name: weight.cpu().clone() for name, weight in weights}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


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
