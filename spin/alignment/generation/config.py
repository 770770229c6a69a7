"""The settings of spin/generate.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, part_of, same_as, setting
from spin.alignment.data.config import DataConfig, System
from spin.alignment.data.source_names import with_config
from spin.alignment.data.template_date import parse_date
from spin.alignment.generation import BACKENDS, check_backend_settings, find_backend
from spin.alignment.generation.base import BackendSettings, SamplingConfig, TokenIds
from spin.alignment.models.config import Dtype, ModelConfig

DTYPE_HELP = "precision of the weights; auto: the checkpoint's, or bfloat16 for a large float32 one on a CPU that is faster in it"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate a model's own responses to the prompts of a data set."""

    model: str = setting(help="model folder or Hub name: the opponent", group="model", path="input", set_by_run=True)
    revision: str | None = same_as(ModelConfig, "model_revision", set_by_run=True)
    adapter: str | None = setting(
        None, "folder of LoRA adapters to apply to the model, without merging them first", path="input"
    )
    dtype: Dtype = same_as(ModelConfig, "dtype", recorded=True, help=DTYPE_HELP)
    system: System = same_as(DataConfig, "system")
    chat_template_kwargs: dict[str, Any] = same_as(DataConfig, "chat_template_kwargs", set_by_run=True)
    template_date: str | None = same_as(
        DataConfig, "template_date", set_by_run=True, unset="the day recorded in output_dir, else today"
    )
    trust_remote_code: bool = same_as(ModelConfig, "trust_remote_code")

    input_dir: str = setting(
        help="prompts with ground truth: folder, file or Hub name",
        group="prompts and fractions",
        path="input",
        set_by_run=True,
    )
    output_dir: str = setting(help="folder of the fractions, shared by all machines", path="folder", set_by_run=True)
    split: str = setting("train", "split of the data", path="name", set_by_run=True)
    config: str | None = setting(
        None, "configuration of the data set, such as main; or write NAME:main as input_dir", set_by_run=True
    )
    data_frac: int | Literal["auto"] = setting(
        0, "which fraction to generate; auto: all that are not finished yet", ge=0, set_by_run=True
    )
    frac_len: int = setting(0, "prompts in a fraction (0: all in one)", ge=0)
    max_prompt_length: int = setting(0, "longest prompt in tokens (0: what fits into the context)", ge=0, recorded=True)
    iteration: int = setting(0, "iteration number, recorded in the provenance", set_by_run=True)
    overwrite: bool = setting(
        False, "replace a fraction that was generated from other inputs or settings", set_by_run=True
    )

    num_samples: int = same_as(SamplingConfig, "num_samples", group="sampling")
    temperature: float = same_as(SamplingConfig, "temperature")
    top_p: float = same_as(SamplingConfig, "top_p")
    top_k: int = same_as(SamplingConfig, "top_k")
    min_p: float = same_as(SamplingConfig, "min_p")
    repetition_penalty: float = same_as(SamplingConfig, "repetition_penalty")
    stop: tuple[str, ...] = same_as(SamplingConfig, "stop")
    max_new_tokens: int = same_as(SamplingConfig, "max_new_tokens")
    logprobs: bool = same_as(SamplingConfig, "logprobs")
    seed: int = same_as(SamplingConfig, "seed", set_by_run=True)

    backend: str = setting("transformers", "transformers, vllm or openai", group="backend")
    base_url: str | None = same_as(BackendSettings, "base_url")
    token_ids: TokenIds = same_as(BackendSettings, "token_ids")
    batch_size: int | None = same_as(BackendSettings, "batch_size")
    tensor_parallel_size: int = same_as(BackendSettings, "tensor_parallel_size")
    gpu_memory_utilization: float = same_as(BackendSettings, "gpu_memory_utilization")
    batch_invariant: bool = same_as(BackendSettings, "batch_invariant")
    flush_every: int | None = setting(
        None,
        "finished prompts per part: the most that a killed process loses",
        unset="64; vllm, openai: 512",
        ge=1,
    )
    lease_timeout: float = setting(
        60.0, "seconds without a heartbeat after which the work of a process is given to others", ge=1
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "input_dir", with_config(self.input_dir, self.config))
        check_backend_settings(self.backend, vars(self))
        if (self.base_url is not None) != find_backend(self.backend).needs_server:
            serving = ", ".join(name for name in BACKENDS if find_backend(name).needs_server)
            raise InputError(f"base_url and --backend {serving} require each other: give both or neither")
        if self.template_date is not None:
            parse_date(self.template_date)
        if self.token_ids == "from_text":
            for name, what in (("stop", "the ids of a stop text"), ("logprobs", "log-probs of the sampled tokens")):
                if getattr(self, name):
                    raise InputError(
                        f"token_ids is from_text, but {name} needs {what}, which text does not tell: remove {name}"
                    )
        part_of(self, SamplingConfig)  # runs the checks of its values

    @property
    def sampling(self) -> SamplingConfig:
        """How responses are sampled."""
        return part_of(self, SamplingConfig)

    @property
    def prompts_in_part(self) -> int:
        """The number of finished prompts that are written together."""
        return self.flush_every or find_backend(self.backend).flush_every

    def check_files(self) -> None:
        """Check the folders that the settings name, before the model is located.

        Raises:
            InputError: the output folder is one of the inputs, or the adapter folder lacks a file.
        """
        for name in ("model", "adapter", "input_dir"):
            path = getattr(self, name)
            if path is not None and Path(path).exists() and Path(path).resolve() == Path(self.output_dir).resolve():
                raise InputError(f"output_dir is the folder of {name}, {path}: choose another folder")
        if self.adapter is not None:
            missing = [name for name in ADAPTER_FILES if not (Path(self.adapter) / name).is_file()]
            if missing:
                raise InputError(
                    f"adapter {self.adapter} lacks {' and '.join(missing)}: give the folder of saved LoRA adapters"
                )
