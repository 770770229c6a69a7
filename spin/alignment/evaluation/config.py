"""The settings of spin/evaluate_model.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.settings import check_settings, part_of, same_as, setting
from spin.alignment.data.config import DataConfig, System
from spin.alignment.data.source_names import name_and_config, with_config
from spin.alignment.data.template_date import parse_date
from spin.alignment.generation import BACKENDS, check_backend_settings, find_backend
from spin.alignment.generation.base import BackendSettings, SamplingConfig
from spin.alignment.generation.config import DTYPE_HELP
from spin.alignment.models.config import Dtype, ModelConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on held-out prompts."""

    model: str = setting(help="model folder or Hub name", group="model", path="input", set_by_run=True)
    revision: str | None = same_as(ModelConfig, "model_revision", set_by_run=True)
    dtype: Dtype = same_as(ModelConfig, "dtype", help=DTYPE_HELP)
    system: System = same_as(DataConfig, "system")
    chat_template_kwargs: dict[str, Any] = same_as(DataConfig, "chat_template_kwargs", set_by_run=True)
    template_date: str | None = same_as(DataConfig, "template_date", set_by_run=True, unset="today")
    trust_remote_code: bool = same_as(ModelConfig, "trust_remote_code")

    input_dir: str = setting(
        help="prompts, with ground truth if the metric compares with it: folder, file or Hub name",
        group="prompts and scores",
        path="input",
        set_by_run=True,
    )
    split: str = setting("test", "split of the data", path="name", set_by_run=True)
    config: str | None = setting(
        None, "configuration of the data set, such as main; or write NAME:main as input_dir", set_by_run=True
    )
    output_file: str = setting(
        help="JSON file to write; every response goes to a parquet file of the same name", path="file", set_by_run=True
    )
    metric: str = setting(
        "exact_match", "a rule: exact_match, math_answer, module:function, or a sum (docs/scoring.md)"
    )
    group_by: str | None = setting(
        None, "column of the data, such as a topic or a difficulty: the scores are also averaged for each of its values"
    )
    limit: int = setting(0, "held-out prompts to use, drawn with a fixed seed (0: all)", ge=0)
    samples: int = setting(
        3, "prompts whose responses the JSON file and the report show; eval.parquet has the responses to all", ge=0
    )

    temperatures: list[float] = setting(
        [0.0, 1.0, 0.5], "sampling temperatures, each given once; 0 is greedy", group="sampling", ge=0
    )
    max_new_tokens: int = same_as(SamplingConfig, "max_new_tokens", default=256)
    seed: int = same_as(SamplingConfig, "seed", set_by_run=True)

    backend: str = setting("transformers", "transformers or vllm", group="backend")
    batch_size: int | None = setting(
        None,
        "prompts per batch (transformers)",
        unset="the backend's own; 16 for log-likelihoods",
        ge=1,
    )
    tensor_parallel_size: int = same_as(BackendSettings, "tensor_parallel_size")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.template_date is not None:
            parse_date(self.template_date)
        object.__setattr__(self, "input_dir", with_config(self.input_dir, self.config))
        if find_backend(self.backend).needs_server:
            others = " or ".join(name for name in BACKENDS if not find_backend(name).needs_server)
            raise InputError(
                f"backend {self.backend} needs a running server, but an evaluation loads its model itself: choose {others}"
            )
        check_backend_settings(self.backend, vars(self))
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise InputError(f"temperatures is {self.temperatures}: give one or more, each once")

    def sampling(self, temperature: float) -> SamplingConfig:
        """Return how responses are sampled at a temperature."""
        return replace(part_of(self, SamplingConfig), temperature=temperature)

    def check_files(self) -> None:
        """Check that the files to be written are not data, or would become data of the input folder.

        Raises:
            InputError: they are, or would.
        """
        from spin.alignment.evaluation.responses import responses_path

        source, output = Path(name_and_config(self.input_dir)[0]).resolve(), Path(self.output_file).resolve()
        if output.suffix == ".parquet":
            raise InputError(
                f"output_file is {self.output_file}, the name of the responses' file: give a name such as eval.json"
            )
        if source == output.parent or source in (output, responses_path(output)):
            raise InputError(
                f"output_file {self.output_file} is in the place of the data, {self.input_dir}: choose another folder"
            )

    def check_metric(self) -> None:
        """Check the rule that scores the responses; a module that it names is imported.

        Raises:
            InputError: there is no such rule.
        """
        from spin.alignment.rewards import SCORERS, find_scorer

        if self.metric.isidentifier():
            lookup(SCORERS, self.metric, "metric")
        find_scorer(self.metric)

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Check that a row has the columns that the metric and ``group_by`` read.

        Raises:
            InputError: a column is missing, or its value cannot be used.
        """
        from spin.alignment.rewards import check_columns

        check_columns(self.metric, columns)
        if self.group_by is not None and columns.get(self.group_by) is None:
            raise InputError(f"it has no column '{self.group_by}', which group_by names")
