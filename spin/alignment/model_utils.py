"""Loading a policy, its precision, quantisation and adapters; saving a checkpoint that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.configs import ModelConfig
from spin.alignment.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def resolve_dtype(name: str) -> torch.dtype | str:
    """Return the torch dtype of a name, ``auto`` as it is.

    Raises:
        InputError: the device here lacks it.
    """
    import torch

    if name == "auto":
        return "auto"
    if torch.cuda.is_available() and name == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise InputError("dtype bfloat16 is not supported by this GPU: set dtype to float16 or float32")
    if name == "float16" and not torch.cuda.is_available():
        raise InputError("dtype float16 needs a GPU: set dtype to bfloat16 or float32")
    return getattr(torch, name)


def check_model_path(name: str, needs_weights: bool = True) -> None:
    """Check what can be known of a model before it is loaded; Hub names are checked when they are resolved.

    Raises:
        InputError: no name, a missing folder, no config, no weights, or weights as pickles only.
    """
    if not name:
        raise InputError("model_name_or_path is missing: name a model folder or a Hub model")
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"model folder {name} does not exist: check the path")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} holds no config.json: give the folder of a saved model")
    if needs_weights and not any(folder.glob("*.safetensors")):
        found = "only pickled weights" if any(folder.glob("*.bin")) else "no weights"
        raise InputError(f"{name} holds {found}: save the model as safetensors (save_pretrained) first")


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model: itself, or the Hub snapshot of a revision (fetched unless offline).

    Raises:
        InputError: the Hub model is neither cached nor reachable.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model '{name}' is neither a folder here nor a Hub model that is cached or reachable ({reason}): "
            "check the name, or unset HF_HUB_OFFLINE"
        ) from error


def check_fits(folder: Path, longest: int, max_token_id: int) -> None:
    """Check sequences against a model's configuration before its weights are loaded.

    Raises:
        InputError: sequences are longer than the model's context, or hold ids outside its vocabulary.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    context, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    if context and longest > context:
        raise InputError(
            f"the longest pair has {longest} tokens, but {folder} can attend to {context} tokens: lower max_length"
        )
    if vocabulary and max_token_id >= vocabulary:
        raise InputError(
            f"the data holds token id {max_token_id}, but the vocabulary of {folder} has {vocabulary} entries: give the model "
            "whose tokenizer made the data"
        )


def load_model(config: ModelConfig, seed: int = 42) -> PreTrainedModel:
    """Load a causal language model with dropout off, without adapters (see :func:`add_adapters`).

    ``init_from_config`` starts from random weights drawn with ``seed`` instead.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_path(config.model_name_or_path, needs_weights=not config.init_from_config)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        common["attn_implementation"] = config.attn_implementation
    name, revision, dtype = config.model_name_or_path, config.model_revision, resolve_dtype(config.dtype)
    if config.init_from_config:
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32 if dtype == "auto" else dtype, **common
        )
    else:
        quantisation = _quantisation(config)
        if quantisation is not None:
            common["quantization_config"] = quantisation
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(name, revision), dtype=dtype, use_safetensors=True, **common
        )
    disable_dropout(model)
    _mend_generation_config(model)
    return model


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Let a generation config with sampling values but ``do_sample: false`` sample: transformers refuses to save it as it is."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        settings.validate(strict=True)


def weight_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter by name: what the checkpoint is saved in."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def keep_master_weights(model: torch.nn.Module) -> None:
    """Turn trainable 16-bit parameters to float32; mixed precision computes in 16 bits all the same.

    A step of size 5e-7 on a weight of 0.02 is far below the spacing of bfloat16 there (1e-4): it would be rounded away.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _quantisation(config: ModelConfig) -> Any:
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


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: the policy must equal its opponent at step 0, and log-probs must be those of generation."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Functional dropout reads its rate from the module (attention_dropout, dropout, layerdrop) or from the config.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
                    setattr(holder, name, 0.0)


def add_adapters(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Wrap a model with fresh LoRA adapters: their product is zero, so the policy starts as its opponent.

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
        lora_dropout=0.0,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def merge_adapters(model: Any, state_dict: dict[str, Any], config: ModelConfig) -> PreTrainedModel:
    """Return the base model with the trained adapters merged into its weights.

    The base is loaded anew, without quantisation, on the CPU: merging into 4-bit weights would round the update away, and
    under ZeRO-3 or FSDP no process holds the base whole. ``state_dict`` is the gathered state of the adapted model.
    """
    from dataclasses import replace

    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # One process alone merges: loading into ZeRO-3 partitions would wait for the others for ever.
    unset_hf_deepspeed_config()
    adapters = get_peft_model_state_dict(model, state_dict=state_dict)
    base = load_model(replace(config, load_in_4bit=False, load_in_8bit=False))
    adapted = get_peft_model(base, model.peft_config["default"])
    outcome = set_peft_model_state_dict(adapted, adapters)
    if outcome.unexpected_keys:
        raise RuntimeError(f"adapter weights without a place in the base model: {outcome.unexpected_keys[:3]}")
    return adapted.merge_and_unload()


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    output_dir: str | Path,
    state_dict: dict[str, Any] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Path:
    """Save a model that loads by itself: weights, config, generation config, tokenizer and template.

    Everything is written into a hidden folder, fsynced and moved in place, ``config.json`` last: its existence proves
    completion. Other files of ``output_dir`` (trainer checkpoints, metrics) stay. ``dtypes`` gives the precision of each
    weight where it is not that of the model in memory.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for copy in getattr(model, "all_tied_weights_keys", None) or {}:
        state_dict.pop(copy, None)  # gathering shards gives tied weights twice
    for name, weight in state_dict.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise FloatingPointError(
                f"the trained weight {name} is not finite: lower the learning rate and train again"
            )
        if dtypes and name in dtypes:
            state_dict[name] = weight.to(dtypes[name])
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hidden = output_dir / f".saving-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    for stale in output_dir.glob(".saving-*"):
        shutil.rmtree(stale)
    model.save_pretrained(hidden, state_dict=state_dict)
    if dtypes:
        _write_dtype(hidden / "config.json", Counter(dtypes.values()).most_common(1)[0][0])
    tokenizer.save_pretrained(hidden)
    files = sorted((path for path in hidden.iterdir()), key=lambda path: path.name == "config.json")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for stale in [output_dir / "config.json", *output_dir.glob("*.safetensors*")]:
        stale.unlink(missing_ok=True)
    for path in files:
        path.replace(output_dir / path.name)
    hidden.rmdir()
    return output_dir


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_complete_checkpoint(path: str | Path) -> bool:
    """Return whether a folder holds a model that :func:`save_checkpoint` finished."""
    folder = Path(path)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
