"""Sampling from the current policy: with its own module, or with an engine to which its weights are sent."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.core.memory_folder import MemoryFolder
from spin.alignment.generation import find_backend, make_backend
from spin.alignment.generation.base import BackendSettings, GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.logprobs.forward import causal_model, use_attention
from spin.alignment.models.config import Dtype, ModelConfig
from spin.alignment.models.precision import compute_name
from spin.alignment.models.sharded import has_stored_names, is_sharded, reshard, sharding_name, whole_weights
from spin.alignment.models.vocabulary import ids_without_token
from spin.alignment.training.online.lockstep import Lockstep
from spin.alignment.training.online.sharers import Sharers

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.online.config import OnlineConfig


class PolicySampler(ABC):
    """Samples responses from the policy, with its weights as of the last :meth:`refresh`."""

    @abstractmethod
    def refresh(self) -> None:
        """Load the policy's current weights."""

    @abstractmethod
    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses to each request, in order."""

    @abstractmethod
    def close(self) -> None:
        """Free the sampler's own resources; the policy is left untouched."""


class InPlaceSampler(PolicySampler):
    """Decodes with the policy's own module, so there are no weights to copy; if it is sharded, in step with all processes."""

    def __init__(
        self,
        policy: Any,
        settings: BackendSettings,
        own_attention: str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """``policy`` may have adapters, and is sharded, if at all, before the first response. ``own_attention`` is its
        attention before packing, ``precision`` the autocast context of training."""
        self._policy, self._settings, self._own, self._precision = policy, settings, own_attention, precision
        self._backend: GenerationBackend | None = None
        self._lockstep: Lockstep | None = None

    def refresh(self) -> None:
        """Do nothing: the weights are the policy's own."""

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Decode in evaluation mode and in the precision of training, then restore the module's mode and attention.

        If the policy is sharded, every process must call it, with any number of requests.
        """
        was_training = self._policy.training
        before = use_attention(self._policy, self._own)  # packed attention handles packed rows only
        self._policy.eval()
        reshard(self._policy)  # so that a resumed run decodes with the same kernels
        try:
            with self._precision():
                responses = self._ready().generate(requests, sampling)
                if self._lockstep is not None:
                    self._lockstep.finish()
                return responses
        finally:
            reshard(self._policy)
            use_attention(self._policy, before)
            self._policy.train(was_training)

    def _ready(self) -> GenerationBackend:
        """Return the backend; a policy that was sharded since the last response gets another."""
        from spin.alignment.generation.transformers.backend import TransformersBackend

        sharded = is_sharded(self._policy)
        if self._backend is None or sharded != (self._lockstep is not None):
            causal = causal_model(self._policy)
            self._lockstep = Lockstep(self._policy, causal.device) if sharded else None
            self._backend = TransformersBackend(self._settings, causal, self._lockstep)
        return self._backend

    def close(self) -> None:
        """Drop the reference to the module; its owner frees it."""
        self._backend = None


class EngineSampler(PolicySampler):
    """Samples with an engine beside the training processes, to which the policy's weights are sent one at a time."""

    def __init__(self, engine: Any | None, policy: Any, dtype: torch.dtype, sharers: Sharers | None = None) -> None:
        """``engine`` is a backend with ``load(weights)``, ``reload(folder)`` and ``sleep()``; None in a process whose engine is
        that of another of its ``sharers``. Weights are sent as ``dtype``."""
        self._engine, self._policy, self._dtype, self._sharers = engine, policy, dtype, sharers
        self._memory: MemoryFolder | None = None

    def refresh(self) -> None:
        """Send the policy's weights to the engine, which also invalidates its prompt cache. Every process must call it."""
        if not has_stored_names(self._policy):
            self._reload()
            return
        weights = ((name, weight.to(self._dtype)) for name, weight in whole_weights(self._policy))
        if self._engine is not None:
            self._engine.load(weights)
        else:  # takes part in gathering them
            for _ in weights:
                pass

    def _reload(self) -> None:
        """Write the weights to a folder in memory as a model, as they are named there, for the engine to reload."""
        if self._engine is None:
            return
        self._memory = self._memory or MemoryFolder("spin-policy-")
        with tempfile.TemporaryDirectory(dir=self._memory.path) as folder:
            save_weights(self._policy, Path(folder), self._dtype)
            self._engine.reload(folder)

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Generate with the engine, which then gives its memory back. Every process must call it."""
        if self._sharers is None:
            assert self._engine is not None
            return self._answer(requests, sampling)
        together = self._sharers.gather(requests)
        return self._sharers.scatter(self._answer(together, sampling) if self._engine is not None else [])

    def _answer(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        assert self._engine is not None
        responses: list[list[Response]] = self._engine.generate(requests, sampling)
        self._engine.sleep()
        return responses

    def close(self) -> None:
        """Shut the engine down."""
        if self._engine is not None:
            self._engine.close()
        if self._memory is not None:
            self._memory.close()


def make_sampler(
    model: Any,
    source: ModelConfig,
    args: OnlineConfig,
    encoder: ChatEncoder,
    own_attention: str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> PolicySampler:
    """Return the sampler of this process for the policy ``model``, which was loaded from ``source``. Every process must call it.

    Raises:
        InputError: the engine is not installed, or does not support the model or its sharding.
    """
    # Under mixed precision the policy's weights have 32 bits, but it computes in 16: so does the engine. Never in a precision
    # that the policy does not compute in.
    compute = compute_name(args)
    causal = causal_model(model)
    policy = cast(Dtype, str(causal.dtype).removeprefix("torch."))
    dtype = source.dtype if source.dtype != "auto" else compute or policy
    settings = BackendSettings(
        model=source.model_name_or_path,
        revision=source.model_revision,
        dtype=dtype,
        batch_size=args.generation_batch_size,
        max_model_len=args.max_prompt_length + args.max_new_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size,
        beside_training=True,
        trust_remote_code=source.trust_remote_code,
        stop_ids=encoder.stop_ids,
        masked_ids=ids_without_token(encoder.tokenizer, causal.config),
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )
    if find_backend(args.backend).online != "engine":
        return InPlaceSampler(model, settings, own_attention, precision)
    if (sharding := sharding_name(args) or (hasattr(model, "get_base_model") and "use_peft")) and not has_stored_names(
        model
    ):
        raise InputError(
            f"{type(causal).__name__} is stored under other names than it has in memory, so its weights cannot be sent to "
            f"{args.backend} under {sharding}: use backend transformers, or plain data parallelism without adapters"
        )
    sharers = Sharers.of(args.tensor_parallel_size)
    engine = make_backend(args.backend, settings) if sharers is None or sharers.leads else None
    return EngineSampler(engine, model, getattr(torch, compute or policy), sharers)


def save_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a module's weights to a folder as a model, in the precision ``dtype``."""
    model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()})


__all__ = ["EngineSampler", "InPlaceSampler", "PolicySampler", "make_sampler", "save_weights"]
