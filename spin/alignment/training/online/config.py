"""The settings of online training: those of preference training, and how responses are drawn, labelled and paired."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.sides import SIDES
from spin.alignment.generation import BACKENDS, find_backend
from spin.alignment.generation.base import SamplingConfig
from spin.alignment.methods.pairings import check_num_samples, find_pairing
from spin.alignment.pairs.annotate import SCORER_FLAGS, check_loss
from spin.alignment.rewards.base import ScorerSettings
from spin.alignment.training.config import SPINConfig

BASELINES = ("prompt", "batch")
# Scorers that say how a response does against the others to its prompt.
COMPARATIVE = ("judge", "preference_model")


@dataclass
class OnlineConfig(SPINConfig):
    """Every key of preference training and those of the loop; defaults follow online DPO (verl's recipe "spin").

    Attributes:
        num_samples: responses to each prompt of a step.
        temperature, top_p, top_k, max_new_tokens: how they are drawn.
        backend: transformers (the policy itself) or vllm (an engine whose weights are reloaded before each step).
        generation_batch_size: responses in flight; default: the backend's own.
        gpu_memory_utilization: share of the GPU for the vllm engine.
        pairing: a name in ``PAIRINGS``, or ``module:function``.
        scorer: what labels the responses: a reward function (name or module:function) or a model scorer.
        scorer_model, scorer_batch_size, scorer_max_length, scorer_dtype, base_url, score_cache: see docs/scoring.md.
        trust_remote_code: run code that comes with the policy or the scoring model.
        baseline: rewards of every_sample are relative to the soft mean of their ``prompt`` or of the whole ``batch``.
        soft_mean_b: b of that soft mean; 0 is the arithmetic mean.
        updates_per_batch: optimiser steps on the pairs of one batch of prompts.
        ref_update_freq: the policy becomes the reference every so many batches.
        eval_prompts, eval_split: held-out prompts, answered every ``eval_steps`` steps and at the end.
        eval_temperatures: they are answered at each of them.
        eval_limit: held-out prompts to use (0: all).

    ``per_device_train_batch_size * gradient_accumulation_steps`` counts prompts of a process here; a step is a batch of prompts.
    """

    learning_rate: float = 1e-6
    warmup_steps: float = 15
    save_strategy: str = "steps"
    num_samples: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    backend: str = "transformers"
    generation_batch_size: int | None = None
    gpu_memory_utilization: float = 0.4
    pairing: str = "best_vs_worst"
    scorer: str | None = None
    scorer_model: str | None = None
    scorer_batch_size: int = 16
    scorer_max_length: int | None = None
    scorer_dtype: str = "auto"
    base_url: str | None = None
    score_cache: str | None = None
    trust_remote_code: bool = False
    baseline: str = "prompt"
    soft_mean_b: float = 1.0
    updates_per_batch: int = 1
    ref_update_freq: int = 1
    eval_prompts: str | None = None
    eval_split: str = "test"
    eval_temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    eval_limit: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("updates_per_batch", 1),
            ("ref_update_freq", 1),
            ("max_new_tokens", 1),
            ("scorer_batch_size", 1),
            ("eval_limit", 0),
            ("soft_mean_b", 0),
        ):
            if not lowest <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: set it to {lowest} or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"gpu_memory_utilization is {self.gpu_memory_utilization}: set it to a share in (0, 1]")
        lookup(
            {name: name for name in BACKENDS if find_backend(name).online}, self.backend, "online generation backend"
        )
        unused = "gpu_memory_utilization" not in find_backend(self.backend).takes
        if unused and self.gpu_memory_utilization != type(self).gpu_memory_utilization:
            raise InputError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}, but backend {self.backend} does not use it: remove it"
            )
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise InputError(f"generation_batch_size is {self.generation_batch_size}: set it to 1 or more")
        lookup({name: name for name in BASELINES}, self.baseline, "baseline")
        if self.reference_dir:
            raise InputError("reference_dir is set, but the reference of an online step is never stored: remove it")
        if self.alpha:
            raise InputError(
                f"alpha is {self.alpha}, but its KL term needs an opponent that stays the same, and an online reference moves: "
                "remove it"
            )
        if self.reverse:
            raise InputError("reverse is true, but online pairs are made by their labels: remove it")
        self.sampling = SamplingConfig(
            num_samples=self.num_samples,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        self._check_method()
        if self.eval_prompts and not self.scorer:
            raise InputError("eval_prompts is set, but no scorer tells how good a response is: set scorer")
        if not self.eval_prompts and self.eval_strategy != "no":
            raise InputError(
                f"eval_strategy is {self.eval_strategy}, but eval_prompts names no held-out prompts: set it"
            )
        for name, default in (("eval_limit", 0), ("eval_split", "test"), ("eval_temperatures", [0.0, 1.0])):
            if not self.eval_prompts and getattr(self, name) != default:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but no held-out prompts are answered: name them by eval_prompts (in "
                    f"a run: set eval_strategy), or remove {name}"
                )
        if not self.eval_temperatures or len(set(self.eval_temperatures)) < len(self.eval_temperatures):
            raise InputError(f"eval_temperatures is {self.eval_temperatures}: name one or more, each once")
        for temperature in self.eval_temperatures:
            SamplingConfig(temperature=temperature)
        super().__post_init__()

    def _check_method(self) -> None:
        """Check that sampling, scorer, pairing and loss fit together."""
        pairing = find_pairing(self.pairing)
        self.needs = pairing.needs
        check_num_samples(self.pairing, pairing, self.num_samples)
        if self.needs and not self.scorer:
            raise InputError(f"pairing {self.pairing} compares scores, but scorer is not set: name a scorer")
        check_loss(self.pairing, self.loss_type)
        further = [name for name in self.loss.responses if name not in SIDES]
        if further:
            raise InputError(
                f"loss_type {self.loss_type} reads a response '{further[0]}' beside chosen and rejected, which no step of online "
                "training draws: choose another loss_type, or train on pairs with run_spin.py"
            )
        for name, default in (("baseline", "prompt"), ("soft_mean_b", 1.0)):
            if getattr(self, name) != default and pairing.relative is None:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but pairing {self.pairing} uses no baseline: remove it"
                )
        own = {name: default for name, default in SCORER_FLAGS.items() if name != "trust_remote_code"}
        given = [name for name, default in own.items() if getattr(self, name) != default]
        if given and not self.scorer:
            raise InputError(f"{given[0]} is {getattr(self, given[0])}, but no scorer is set: set scorer, or remove it")
        if self.eval_prompts and self.scorer in COMPARATIVE and "chosen_score" not in self.needs:
            raise InputError(
                f"eval_prompts is set, but the scorer {self.scorer} compares responses, and the one response to a "
                "held-out prompt has nothing beside it: remove eval_prompts, or score with a rule or a reward model"
            )

    @property
    def scorer_settings(self) -> ScorerSettings | None:
        """The scorer as the scoring package takes it; None where no response is scored."""
        if self.scorer is None:
            return None
        return ScorerSettings(
            name=self.scorer,
            model=self.scorer_model,
            batch_size=self.scorer_batch_size,
            max_length=self.scorer_max_length,
            base_url=self.base_url,
            cache_dir=self.score_cache,
            dtype=self.scorer_dtype,
            # The key is the policy's as well; rules and judges run no such code and would refuse it.
            trust_remote_code=self.trust_remote_code and self.scorer in ("reward_model", "preference_model"),
            score_reference="chosen_score" in self.needs,
        )
