"""Keys of older configuration files: their new names, or why they were removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin.alignment.core.errors import InputError

# Keys that transformers has renamed since the configuration files of the original SPIN code were written.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
}
REMOVED = {
    "use_flash_attention_2": "set attn_implementation to flash_attention_2",
    "use_lora": "set use_peft to true",
    "lora_dropout": "remove it (the policy must equal its reference at the first step, so dropout is off)",
    "ref_model_name_or_path": "remove it (the reference is the model that training starts from)",
    "hub_model_revision": "use model_revision",
    "bnb_4bit_quant_type": "remove it (nf4 is used)",
}


def rename_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the mapping with renamed keys under their new names.

    Raises:
        InputError: a key that was removed (the message gives the fix), or both the old and the new name of a key.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if key in REMOVED:
            raise InputError(f"the key '{key}' in {source} is not supported: {REMOVED[key]}")
        new = RENAMED.get(key, key)
        if new in renamed or (new != key and new in values):
            raise InputError(f"{source} has both '{key}' and '{new}', which are the same setting: keep '{new}'")
        # YAML parses a bare `no` as false.
        renamed[new] = "no" if value is False and new.endswith("_strategy") else value
    return renamed
