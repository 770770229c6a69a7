"""Settings of a model: its source, precision and adapters."""

from __future__ import annotations

import dataclasses
import typing

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, setting

Dtype = typing.Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The initial model, its precision, and adapters."""

    model_name_or_path: str = setting(
        "",
        "folder or Hub name of the model that training starts from; in self-play it is also the opponent",
        group="model",
        path="input",
        unset="must be given",
        set_by_run=True,
    )
    model_revision: str | None = setting(None, "revision of a Hub model", set_by_run=True)
    dtype: Dtype = setting("auto", "precision of the weights; auto: that of the checkpoint")
    attn_implementation: str | None = setting(
        None, "attention implementation of transformers: sdpa, flash_attention_2 ...", unset="transformers' own choice"
    )
    trust_remote_code: bool = setting(False, "run code that ships with the model")
    init_from_config: bool = setting(False, "start from random weights (run_sft.py only)")
    use_peft: bool = setting(False, "train LoRA adapters, merged at the end")
    lora_r: int = setting(16, "rank of the adapters", ge=1)
    lora_alpha: int = setting(32, "scale of the adapters", ge=1)
    lora_target_modules: list[str] | str = setting("all-linear", "modules that get adapters")
    load_in_4bit: bool = setting(False, "quantise the base model to 4 bits (needs use_peft and bitsandbytes)")
    load_in_8bit: bool = setting(False, "quantise the base model to 8 bits (needs use_peft and bitsandbytes)")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both true: choose one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise InputError("load_in_4bit and load_in_8bit can only train adapters: set use_peft to true")
