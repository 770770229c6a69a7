"""Settings of the training data: which rows are used, and how they are truncated."""

from __future__ import annotations

import dataclasses
import typing

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, setting
from spin.alignment.data.source_names import with_config
from spin.alignment.data.template_date import parse_date

System = typing.Literal["keep", "fold"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pairs are trained on, and how they are truncated. Lengths in tokens."""

    dataset_mixer: dict[str, float] = setting(
        {},
        "'path: fraction' lines: folders of preference parquet (run_sft.py, run_online.py: prompts)",
        group="data",
        path="input",
        unset="must be given",
        set_by_run=True,
    )
    dataset_splits: list[str] = setting(
        ["train_prefs"],
        "splits to load (run_sft.py, run_online.py: train); add test_prefs to evaluate",
        path="name",
        set_by_run=True,
    )
    dataset_configs: list[str] = setting(
        [],
        "configuration of each data set of dataset_mixer, in order; or write 'path:configuration' there",
        set_by_run=True,
    )
    preprocessing_num_workers: int = setting(
        1, "processes that encode the data; at least as many as train on the machine", ge=1, recorded=False
    )
    max_length: int = setting(1024, "longest prompt plus response, in tokens", ge=1)
    max_prompt_length: int = setting(512, "prompt tokens kept if prompt plus response exceed max_length", ge=1)
    system: System = setting(
        "keep", "fold moves a system turn into the first user turn, for templates without a system role"
    )
    chat_template_kwargs: dict[str, typing.Any] = setting(
        {},
        "arguments of the chat template, such as enable_thinking: false; the same when generating and training",
        set_by_run=True,
    )
    template_date: str | None = setting(
        None,
        "day that a chat template with today's date sees, as YYYY-MM-DD",
        unset="the day recorded in the pairs or in the output to continue, else today",
        recorded=False,
        set_by_run=True,
    )

    retokenize: bool = setting(
        False,
        "encode the text of the pairs with the model's own tokenizer and template, instead of training on the ids that another "
        "model sampled",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.template_date is not None:
            parse_date(self.template_date)
        if self.dataset_configs and len(self.dataset_configs) != len(self.dataset_mixer):
            raise InputError(
                f"dataset_configs names {len(self.dataset_configs)} configurations for {len(self.dataset_mixer)} data sets: name "
                "one for each data set of dataset_mixer"
            )
        if self.dataset_configs:
            named = zip(self.dataset_mixer.items(), self.dataset_configs, strict=True)
            mixer = {with_config(source, config): fraction for (source, fraction), config in named}
            object.__setattr__(self, "dataset_mixer", mixer)
        if self.max_length <= self.max_prompt_length:
            raise InputError(
                f"max_prompt_length is {self.max_prompt_length} and max_length {self.max_length}: "
                "max_prompt_length must be smaller than max_length"
            )
