"""Settings of the training data: which rows are used, and how they are truncated."""

from __future__ import annotations

import dataclasses
import typing

from spin.alignment.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pairs are trained on, and how they are truncated. Lengths in tokens."""

    dataset_mixer: dict[str, float] = dataclasses.field(default_factory=dict)
    dataset_splits: list[str] = dataclasses.field(default_factory=lambda: ["train_prefs"])
    preprocessing_num_workers: int = 1
    max_length: int = 1024
    max_prompt_length: int = 512
    system: typing.Literal["keep", "fold"] = "keep"

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_length <= self.max_prompt_length:
            raise InputError(
                f"max_prompt_length is {self.max_prompt_length} and max_length {self.max_length}: "
                "the prompt needs at least 1 token and must leave room for a response"
            )
        if self.preprocessing_num_workers < 1:
            raise InputError(f"preprocessing_num_workers is {self.preprocessing_num_workers}: set it to 1 or more")
