"""Settings of a model: its source, precision and adapters."""

from __future__ import annotations

import dataclasses
import typing

from spin.alignment.core.errors import InputError

Dtype = typing.Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The initial model, its precision, and adapters."""

    model_name_or_path: str = ""
    model_revision: str | None = None
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    init_from_config: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] | str = "all-linear"
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both true: choose one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise InputError("load_in_4bit and load_in_8bit can only train adapters: set use_peft to true")
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise InputError(f"lora_r is {self.lora_r} and lora_alpha {self.lora_alpha}: set both to 1 or more")
