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
from spin.alignment.rewards.base import ScorerSettings

# Files that a model or its training consists of; results must not replace them.
MODEL_FILES = frozenset(
    {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on held-out prompts."""

    model: str = setting(help="model folder or Hub name", group="model", path="input", set_by_run=True, recorded=False)
    revision: str | None = same_as(ModelConfig, "model_revision", set_by_run=True, recorded=False)
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
        recorded=False,
    )
    split: str = setting("test", "split of the data", path="name", set_by_run=True, recorded=False)
    config: str | None = setting(
        None,
        "configuration of the data set, such as main; or write NAME:main as input_dir",
        set_by_run=True,
        recorded=False,
    )
    output_file: str = setting(
        help="JSON file to write; every response goes to a parquet file of the same name",
        path="file",
        set_by_run=True,
        recorded=False,
    )
    overwrite: bool = setting(
        False, "evaluate again, even if output_file has the results of this model, data and settings", recorded=False
    )
    cache_dir: str | None = setting(
        None,
        "folder that results are kept in by content (model, data, settings), for other runs with the same start model",
        path="folder",
        recorded=False,
    )
    metric: str = setting(
        "exact_match",
        "what scores the responses: a rule (exact_match, math_answer, module:function, or a sum) or a model: reward_model, "
        "preference_model, judge, the last two against the ground truth (docs/scoring.md)",
    )
    group_by: str | None = setting(
        None, "column of the data, such as a topic or a difficulty: the scores are also averaged for each of its values"
    )
    limit: int = setting(0, "held-out prompts to use, drawn with a fixed seed (0: all)", ge=0)
    samples: int = setting(
        3, "prompts whose responses the JSON file and the report show; eval.parquet has the responses to all", ge=0
    )

    win_rate_by: str | None = setting(
        None,
        "what compares the responses with those of other models: judge, preference_model, or any other scorer",
        unset="the scores of the metric",
        group="win rates",
    )
    against: list[str] = setting(
        [],
        "eval.json of the models that responses are compared with, on the prompts that both have; each is called by the name "
        "of its folder",
        path="input",
        set_by_run=True,
        recorded=False,
    )
    scorer_model: str | None = same_as(ScorerSettings, "model")
    scorer_batch_size: int = same_as(ScorerSettings, "batch_size", recorded=False)
    scorer_max_length: int | None = same_as(ScorerSettings, "max_length")
    scorer_dtype: Dtype = same_as(ScorerSettings, "dtype")
    base_url: str | None = same_as(ScorerSettings, "base_url", recorded=False)
    score_cache: str | None = same_as(ScorerSettings, "cache_dir", recorded=False)

    tasks: list[str] = setting(
        [],
        "tasks of lm-evaluation-harness, each with the number of examples shown, as in arc_challenge=25, or a preset: "
        "open_llm_leaderboard, gsm8k, ifeval (docs/evaluation.md)",
        group="benchmarks",
    )
    task_dir: str | None = setting(None, "folder with YAML files of further tasks", path="input")
    task_limit: int = setting(0, "documents of each task (0: all)", ge=0)
    task_chat_template: bool = setting(
        False, "put the prompts of tasks into the model's chat template; the leaderboard's numbers are without one"
    )

    temperatures: list[float] = setting(
        [0.0, 1.0, 0.5], "sampling temperatures, each given once; 0 is greedy", group="sampling", ge=0
    )
    num_samples: int = setting(
        1, "responses per prompt at every temperature above 0; several give pass@k and maj@n", ge=1, le=1000
    )
    max_new_tokens: int = same_as(SamplingConfig, "max_new_tokens", default=256)
    seed: int = same_as(SamplingConfig, "seed", set_by_run=True)

    backend: str = setting(
        "transformers", "transformers, vllm or openai; a server computes no log-likelihoods (NLL)", group="backend"
    )
    server_url: str | None = same_as(BackendSettings, "base_url", recorded=False)
    batch_size: int | None = setting(
        None,
        "prompts per batch (transformers)",
        unset="the backend's own; 16 for log-likelihoods",
        ge=1,
        recorded=False,
    )
    tensor_parallel_size: int = same_as(BackendSettings, "tensor_parallel_size", recorded=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.template_date is not None:
            parse_date(self.template_date)
        object.__setattr__(self, "input_dir", with_config(self.input_dir, self.config))
        served = find_backend(self.backend).needs_server
        if (self.server_url is not None) != served:
            serving = ", ".join(name for name in BACKENDS if find_backend(name).needs_server)
            raise InputError(f"server_url and backend {serving} require each other: give both or neither")
        if served and self.tasks:
            raise InputError(f"tasks are run with the model itself, not by backend {self.backend}: choose another")
        if self.num_samples > 1 and not any(self.temperatures):
            raise InputError(
                f"num_samples is {self.num_samples}, but temperature 0 gives the same response every time: add another to "
                "temperatures"
            )
        check_backend_settings(self.backend, vars(self))
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise InputError(f"temperatures is {self.temperatures}: give one or more, each once")

    def sampling(self, temperature: float) -> SamplingConfig:
        """Return how responses are sampled at a temperature."""
        samples = self.num_samples if temperature else 1
        return replace(part_of(self, SamplingConfig), temperature=temperature, num_samples=samples)

    def check_files(self) -> None:
        """Check that the files to be written are not data, or would become data of the input folder.

        Raises:
            InputError: they are, or would.
        """
        from spin.alignment.evaluation.responses import responses_path

        source, output = Path(name_and_config(self.input_dir)[0]).resolve(), Path(self.output_file).resolve()
        if output.name in MODEL_FILES and output.is_file():
            raise InputError(f"output_file {self.output_file} is a file of a model: give a name such as eval.json")
        if output.suffix == ".parquet":
            raise InputError(
                f"output_file is {self.output_file}, the name of the responses' file: give a name such as eval.json"
            )
        if source == output.parent or source in (output, responses_path(output)):
            raise InputError(
                f"output_file {self.output_file} is in the place of the data, {self.input_dir}: choose another folder"
            )

    @property
    def scorers(self) -> dict[str, ScorerSettings]:
        """The settings of the scorers by name: that of the metric, and that of the win rates if it is another one.

        Only one of them can be a model, which the settings ``scorer_*`` then belong to.
        """
        own = part_of(self, ScorerSettings, name=self.metric)
        plain = ScorerSettings(name=self.metric)
        by = self.win_rate_by
        if by is None or by == self.metric:
            return {self.metric: own}
        if self._is_model(by):
            return {self.metric: plain, by: replace(own, name=by)}
        return {self.metric: own, by: replace(plain, name=by)}

    @staticmethod
    def _is_model(name: str) -> bool:
        from spin.alignment.rewards import GROUP_SCORERS

        return name in GROUP_SCORERS

    def check_metric(self) -> None:
        """Check the scorers of the responses and of the win rates; a module that a rule names is imported.

        Raises:
            InputError: there is no such scorer, or its settings do not fit.
        """
        from spin.alignment.rewards import GROUP_SCORERS, SCORERS, check_scorer

        if self.metric.isidentifier():
            lookup({name: name for name in (*SCORERS, *GROUP_SCORERS)}, self.metric, "metric")
        by = self.win_rate_by
        if by not in (None, self.metric) and {by, self.metric} <= GROUP_SCORERS.keys():
            raise InputError(
                f"metric {self.metric} and win_rate_by {by} are two models, but scorer_model names one: make one of them a rule, "
                "or evaluate twice"
            )
        for settings in self.scorers.values():
            check_scorer(settings)

    @property
    def compares(self) -> bool:
        """Whether the metric compares responses with the ground truth."""
        from spin.alignment.rewards import PAIRWISE, needs_reference

        return self.metric in PAIRWISE or needs_reference(self.metric)

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Check that a row has the columns that the metric and ``group_by`` read.

        Raises:
            InputError: a column is missing, or its value cannot be used.
        """
        from spin.alignment.rewards import check_columns

        for name in self.scorers:
            check_columns(name, columns)
        if self.group_by is not None and columns.get(self.group_by) is None:
            raise InputError(f"it has no column '{self.group_by}', which group_by names")
