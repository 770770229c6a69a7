"""Keys of other projects' configuration files: what they mean here, or why they are refused.

The original SPIN and SPPO code, alignment-handbook, TRL's DPO and verl have keys that this project names differently, that have
only one possible value here, or that it does not support. Each is listed once below, so that a configuration file of theirs
either means what it meant there or is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spin.alignment.core.config import convert
from spin.alignment.core.errors import InputError

# The same setting under another name.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1, warmup_steps is a fraction of all steps
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "max_seq_length": "max_length",
    "dataset_num_proc": "preprocessing_num_workers",
    "use_flash_attention_2": "attn_implementation",
}

# Values that mean what this project does anyway: the key is accepted and dropped. Any other value is refused (REMOVED).
AS_HERE: dict[str, tuple[Any, ...]] = {
    "use_lora": (False, None),
    "lora_dropout": (0, None),
    "lora_modules_to_save": (None, []),
    "lora_task_type": ("CAUSAL_LM", None),
    "lora_target_parameters": (None,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "ref_model_name_or_path": (None,),
    "base_model_revision": (None,),
    "model_code_revision": (None,),
    "hub_model_revision": ("main", None),
    "bnb_4bit_quant_type": ("nf4",),
    "use_bnb_nested_quant": (True,),
    "bnb_4bit_quant_storage": (None,),
    "model_init_kwargs": (None,),
    "chat_template": (None,),
    "eos_token": (None,),
    "truncation_side": ("left", None),
    "max_train_samples": (None,),
    "max_eval_samples": (None,),
    "max_completion_length": (None,),
    "max_target_length": (None,),
    "dataset_name": (None,),
    "dataset_config": (None,),
    "dataset_train_split": ("train",),
    "dataset_test_split": ("test",),
    "dataset_streaming": (False,),
    "dataset_kwargs": (None, {"add_special_tokens": False, "append_concat_token": False}),
    "dataset_mixture": (None,),
    "ignore_bias_buffers": (False,),
    "disable_dropout": (True,),
    "precompute_ref_log_probs": (True,),
    "reference_free": (False,),
    "force_use_ref_model": (False,),
    "sync_ref_model": (False,),
    "use_weighting": (False,),
    "loss_weights": (None,),
    "ld_alpha": (None,),
    "rpo_alpha": (None,),
    "f_divergence_type": ("reverse_kl",),
    "generate_during_eval": (False,),
}

REMOVED = {
    "use_lora": "set use_peft to true",
    "lora_dropout": "set it to 0 or remove it (the policy must equal its reference at the first step, so dropout is off)",
    "lora_modules_to_save": "remove it (adapters are trained, not whole modules; for embeddings and head set use_peft to false)",
    "lora_task_type": "remove it (it is CAUSAL_LM)",
    "lora_target_parameters": "use lora_target_modules",
    "use_rslora": "remove it (set lora_alpha to the scale you want)",
    "use_dora": "remove it (adapters are plain LoRA)",
    "ref_model_name_or_path": "remove it (the reference is the model that training starts from)",
    "ref_model": "remove it (the reference is the model that training starts from)",
    "base_model_revision": "use model_revision, and merge adapters into their base model first",
    "model_code_revision": "use model_revision",
    "hub_model_revision": "use model_revision to load, hub_revision to push",
    "bnb_4bit_quant_type": "remove it (nf4 is used)",
    "use_bnb_nested_quant": "remove it (double quantisation is used)",
    "bnb_4bit_quant_storage": "remove it (uint8 is used)",
    "model_init_kwargs": "use dtype, attn_implementation, model_revision and trust_remote_code",
    "chat_template": "save it as chat_template.jinja in the model's folder, where generation reads it too",
    "eos_token": "set it in the model's tokenizer, where generation reads it too",
    "truncation_side": "remove it (a prompt is truncated on the left, a response on the right)",
    "truncation_mode": "remove it (a prompt keeps its end, a response its start: docs/training.md#truncation)",
    "max_train_samples": "lower the fraction in dataset_mixer",
    "max_eval_samples": "make a smaller test split",
    "max_completion_length": "use max_length, which limits prompt plus response",
    "max_target_length": "use max_length, which limits prompt plus response",
    "dataset_name": "write it as dataset_mixer: {NAME: 1.0}",
    "dataset_config": "write the data set as a folder and name that in dataset_mixer",
    "dataset_train_split": "use dataset_splits",
    "dataset_test_split": "use dataset_splits",
    "dataset_kwargs": "remove it (rows are encoded with the chat template alone)",
    "dataset_streaming": "remove it (the pairs are encoded before training)",
    "dataset_mixture": "use dataset_mixer",
    "ignore_bias_buffers": "remove it",
    "disable_dropout": "remove it (the policy must equal its reference at the first step, so dropout is off)",
    "precompute_ref_log_probs": "remove it (the reference log-probs are always computed once and stored)",
    "reference_free": "choose a loss_type without a reference (tspin)",
    "force_use_ref_model": "remove it (the reference is the model that training starts from)",
    "sync_ref_model": "use run_online.py with ref_update_freq",
    "ref_model_mixup_alpha": "remove it (the reference is the model that training starts from)",
    "ref_model_sync_steps": "use run_online.py with ref_update_freq",
    "precompute_ref_batch_size": "use max_tokens_per_batch",
    "use_weighting": "use token weights (docs/wspin.md)",
    "loss_weights": "use nll_weight for an NLL term",
    "ld_alpha": "use length_normalize",
    "rpo_alpha": "use nll_weight",
    "f_divergence_type": "remove it (the margin is that of the reverse KL)",
    "f_alpha_divergence_coef": "remove it (the margin is that of the reverse KL)",
    "discopop_tau": "remove it (this loss is not available)",
    "generate_during_eval": "evaluate with evaluate_model.py",
    "actor_rollout_ref": "this is a configuration of verl: write its settings with the keys of docs/online.md",
    "critic": "this is a configuration of verl: write its settings with the keys of docs/online.md",
    "algorithm": "this is a configuration of verl: write its settings with the keys of docs/online.md",
    "reward_model": "this is a configuration of verl: write its settings with the keys of docs/online.md",
    "trainer": "this is a configuration of verl: write its settings with the keys of docs/online.md",
}


def _read_bool(value: Any) -> Any:
    """Return true or false for a text that means it, as transformers' own parser does; any other value is unchanged."""
    meant = {"yes": True, "true": True, "no": False, "false": False}
    return meant.get(value.lower(), value) if isinstance(value, str) else value


def _flash_attention(value: Any) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if _read_bool(value) else {}


def _original_dtype(value: Any) -> dict[str, Any]:
    # No dtype meant float32 in the transformers of that time.
    return {"dtype": "float32" if value is None else value}


# Keys whose value has another form here: the key and value that they stand for, or nothing.
_TRANSLATED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "use_flash_attention_2": _flash_attention,
    "torch_dtype": _original_dtype,
    "do_eval": lambda value: {"do_eval": _read_bool(value)},
}


def rename_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the mapping with other projects' keys under the names and values that they have here.

    Raises:
        InputError: a key that is not supported (the message gives the fix), or both names of a key.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if key in AS_HERE and any(value is wanted or value == wanted for wanted in AS_HERE[key]):
            continue
        if key in REMOVED:
            raise InputError(f"the key '{key}' in {source} is not supported: {REMOVED[key]}")
        if key == "warmup_ratio" and convert(value, float, f"'{key}' in {source}") >= 1:
            raise InputError(
                f"'{key}' in {source} is {value}: set it below 1, or set warmup_steps to a number of steps"
            )
        found = _TRANSLATED[key](value) if key in _TRANSLATED else {RENAMED.get(key, key): value}
        for new, meant in found.items():
            if new in renamed or (new != key and new in values):
                raise InputError(f"{source} has both '{key}' and '{new}', which are the same setting: keep '{new}'")
            # YAML parses a bare `no` as false.
            renamed[new] = "no" if meant is False and new.endswith("_strategy") else meant
    return renamed
