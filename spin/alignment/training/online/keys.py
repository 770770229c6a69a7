"""The keys of online training beyond those of preference training, without heavy imports, for ``--help`` and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spin.alignment.core.settings import same_as, setting
from spin.alignment.generation.base import BackendSettings, SamplingConfig
from spin.alignment.models.config import Dtype
from spin.alignment.rewards.base import ScorerSettings


@dataclass
class OnlineKeys:
    """The keys of the online loop; defaults follow online DPO (verl's recipe "spin")."""

    num_samples: int = same_as(SamplingConfig, "num_samples", default=2, group="sampling")
    temperature: float = same_as(SamplingConfig, "temperature")
    top_p: float = same_as(SamplingConfig, "top_p")
    top_k: int = same_as(SamplingConfig, "top_k")
    max_new_tokens: int = same_as(
        SamplingConfig,
        "max_new_tokens",
        default=256,
        help="maximum tokens of a response, including the end-of-turn token",
        ge=1,
    )
    backend: str = setting(
        "transformers",
        "transformers: decodes with the policy's own module, without a copy; vllm: an engine beside each process, to which the "
        "weights are sent one at a time before each step; openai: a vLLM server elsewhere, to which they are pushed",
    )
    server_url: str | None = setting(
        None, "address of the server that answers (openai), such as http://host:8000/v1", recorded=False
    )
    generation_batch_size: int | None = same_as(BackendSettings, "batch_size")
    gpu_memory_utilization: float = same_as(
        BackendSettings,
        "gpu_memory_utilization",
        default=0.4,
        help="fraction of GPU memory for the engine (vllm), which gives it back while the policy is trained",
    )
    tensor_parallel_size: int = same_as(
        BackendSettings,
        "tensor_parallel_size",
        help="neighbouring processes that share an engine over their GPUs (vllm)",
    )

    scorer: str | None = same_as(ScorerSettings, "name", default=None, group="labels")
    scorer_model: str | None = same_as(ScorerSettings, "model")
    scorer_batch_size: int = same_as(ScorerSettings, "batch_size")
    scorer_max_length: int | None = same_as(ScorerSettings, "max_length")
    scorer_dtype: Dtype = same_as(ScorerSettings, "dtype")
    base_url: str | None = same_as(ScorerSettings, "base_url")
    score_cache: str | None = same_as(ScorerSettings, "cache_dir", recorded=False)
    trust_remote_code: bool = same_as(
        ScorerSettings, "trust_remote_code", help="run code that comes with the policy or the scoring model"
    )

    pairing: str = setting(
        "best_vs_worst", "how chosen and rejected responses are selected: a name, or module:function", group="pairs"
    )
    baseline: Literal["prompt", "batch"] = setting(
        "prompt", "rewards of every_sample are relative to the soft mean over the prompt or the batch"
    )
    soft_mean_b: float = setting(
        1.0, "b in the soft mean log mean exp(b r) / b; 0 is the arithmetic mean (every_sample)", ge=0
    )

    updates_per_batch: int = setting(
        1, "optimiser steps per batch of prompts (verl: train batch / mini-batch)", group="loop", ge=1
    )
    ref_update_freq: int = setting(
        1,
        "number of steps between updates of the reference to the policy; 1: the reference is the policy that sampled, and no "
        "copy is kept (with async_steps: 1, one is); -1: the reference stays the initial model",
    )
    async_steps: int = setting(
        0,
        "1: the next batch is sampled while the policy is trained on the last one, so its responses are from weights one step "
        "older (vllm, openai); 0: sampling and training take turns",
        ge=0,
        le=1,
    )
    importance_cap: float | None = setting(
        None,
        "weighs the loss of each pair with the probability of its sampled responses under the policy over that under the weights "
        "that sampled them, at most this much",
        unset="off",
        ge=1,
    )

    eval_prompts: str | None = setting(
        None,
        "held-out prompts, answered every eval_steps steps and at the end",
        group="held out",
        path="input",
        set_by_run=True,
    )
    eval_split: str = setting("test", "split of the held-out prompts", path="name", set_by_run=True)
    eval_temperatures: list[float] = setting(
        [0.0, 1.0], "temperatures for answering the held-out prompts, without duplicates", ge=0
    )
    eval_limit: int = setting(0, "number of held-out prompts to use (0: all)", ge=0)

    eval_samples: int = setting(
        1,
        "responses to each held-out prompt at temperatures above 0; with several, best-of-n and pass@k are logged",
        ge=1,
    )
    eval_pass_score: float = setting(1.0, "lowest score of a held-out response that passes, for pass@k")

    kept_prompts: int = setting(
        4,
        "prompts of each step whose responses and scores are stored in output_dir/responses (0: none)",
        group="stored responses",
        ge=0,
        recorded=False,
    )
    kept_steps: int = setting(100, "newest steps whose responses are stored", ge=1, recorded=False)

    learning_rate: float = setting(1e-6, "peak learning rate", group="optimiser", gt=0)
    warmup_steps: float = setting(15, "number of warm-up steps; below 1: as a fraction of all steps", ge=0)
    save_strategy: str = setting("steps", "when to save a checkpoint: no, steps, epoch", recorded=False)
