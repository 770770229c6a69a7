"""The settings of spin/estimate_weights.py: the models that score tokens, and how scores become weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, default_of, part_of, same_as, setting, settings_of
from spin.alignment.data.config import DataConfig, System
from spin.alignment.methods.weightings import DEFAULT_TRANSFORM, check_transform, find_weighting
from spin.alignment.models.config import Dtype, ModelConfig

# Settings used only by weightings that compare two models, only by those that give gains, and (_OF_TOKENIZER) only by those that
# load no model.
_OF_MODELS = ("model_plus", "model_minus", "revision_plus", "revision_minus")
_OF_GAINS = ("transform", "transform_params")
_OF_SCORING = ("max_length", "max_prompt_length", "batching", "dtype")
_OF_TOKENIZER = ("tokenizer", "revision_tokenizer")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Compute token weights for the responses of preference data."""

    input_dir: str = setting(
        help="folder with {split}_prefs-*.parquet from convert_data.py, or with pairs of another tool",
        group="rows",
        path="input",
        set_by_run=True,
    )
    output_dir: str = setting(help="folder for the same files with token weights", path="folder", set_by_run=True)
    page: str | None = setting(
        None, "HTML file to write, showing a few responses coloured by weight", path="file", set_by_run=True
    )
    page_rows: int = setting(8, "number of pairs on the page", ge=1)
    overwrite: bool = setting(
        False, "replace weights that were computed from other inputs or settings", set_by_run=True
    )

    weighting: str = setting(
        help="reverse_dpo, teacher, stored_gains, drift or uniform, or module:function", group="weights"
    )
    transform: str | None = setting(
        None,
        "maps gains to weights: exponential, origin, binary, threshold, threshold_and_scale, rank_based or random",
        unset=f"{DEFAULT_TRANSFORM} for weightings with gains",
    )
    transform_params: dict[str, float | str] = setting({}, "settings of the transform, such as mu=1")
    seed: int = setting(42, "seed for the random transform", ge=0, set_by_run=True)

    model_plus: str | None = setting(
        None, "the model trained on the pairs, or the teacher", group="models and tokenizer", path="input"
    )
    model_minus: str | None = setting(
        None, "the model trained on the reversed pairs, or the student", path="input", set_by_run=True
    )
    revision_plus: str | None = same_as(ModelConfig, "model_revision")
    revision_minus: str | None = same_as(ModelConfig, "model_revision", set_by_run=True)
    tokenizer: str | None = setting(
        None, "model whose tokenizer encoded the data (stored_gains, drift and uniform)", path="input", set_by_run=True
    )
    revision_tokenizer: str | None = same_as(ModelConfig, "model_revision", set_by_run=True)
    dtype: Dtype = same_as(ModelConfig, "dtype")
    trust_remote_code: bool = same_as(ModelConfig, "trust_remote_code", help="run code that comes with the models")

    system: System = same_as(DataConfig, "system", group="sequences")
    chat_template_kwargs: dict[str, Any] = same_as(DataConfig, "chat_template_kwargs", set_by_run=True)
    template_date: str | None = same_as(
        DataConfig, "template_date", set_by_run=True, unset="the day recorded in the pairs, else today"
    )
    max_length: int = same_as(
        DataConfig,
        "max_length",
        help="maximum length of prompt plus response that is scored, in tokens, as in training",
    )
    max_prompt_length: int = same_as(DataConfig, "max_prompt_length")
    batching: Literal["packed", "padded"] = setting("packed", "padded: works with any architecture, but slower")

    def __post_init__(self) -> None:
        check_settings(self)
        weighting = find_weighting(self.weighting)
        for name in ("model_plus", "model_minus"):
            if weighting.needs_models and not getattr(self, name):
                raise InputError(f"weighting {self.weighting} compares two models: pass --{name}")
        unused = _OF_TOKENIZER if weighting.needs_models else _OF_MODELS
        for name in (*unused, *(() if weighting.gives_gains else _OF_GAINS)):
            if getattr(self, name):
                raise InputError(f"weighting {self.weighting} does not use --{name}: remove it")
        for name in () if weighting.needs_models else _OF_SCORING:
            if getattr(self, name) != default_of(settings_of(type(self))[name]):
                raise InputError(f"weighting {self.weighting} runs no model and does not use --{name}: remove it")
        if not weighting.needs_models and not self.tokenizer:
            raise InputError(f"weighting {self.weighting} needs the data's tokenizer: pass --tokenizer")
        if "seed" in self.transform_params:
            raise InputError(
                "transform_params contains 'seed', but each response has a seed of its own: pass --seed instead"
            )
        _ = self.limits, self.transform_settings  # evaluated for their checks

    @property
    def limits(self) -> DataConfig:
        """The length limits of sequences, as in training."""
        return part_of(self, DataConfig)

    @property
    def transform_name(self) -> str:
        """The name of the transform, in ``WEIGHT_TRANSFORMS``."""
        return self.transform or DEFAULT_TRANSFORM

    @property
    def transform_settings(self) -> dict[str, float]:
        """The settings of the transform, as numbers."""
        return check_transform(self.transform_name, self.transform_params)

    def check_files(self) -> None:
        """Check the input and output folders.

        Raises:
            InputError: input and output are the same folder.
        """
        if Path(self.input_dir).resolve() == Path(self.output_dir).resolve():
            raise InputError(f"output_dir is the same as input_dir {self.input_dir}: choose another folder")
