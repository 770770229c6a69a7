"""Sampling from the current policy: with its own module, or with an engine that receives its weights."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from spin.alignment.core.memory_folder import MemoryFolder
from spin.alignment.generation import find_backend, make_backend
from spin.alignment.generation.base import BackendSettings, GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.logprobs.forward import causal_model, use_attention
from spin.alignment.models.config import Dtype, ModelConfig
from spin.alignment.models.precision import compute_name
from spin.alignment.models.sharded import is_sharded, reshard
from spin.alignment.models.vocabulary import ids_without_token
from spin.alignment.training.online.lockstep import Lockstep

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
    """Samples with an engine in the same process as the policy; its weights are reloaded from a folder in memory."""

    def __init__(self, engine: Any, save_weights: Callable[[Path], None]) -> None:
        """``engine`` is a backend with ``reload(folder)``; ``save_weights`` saves the policy to a folder as a model."""
        self._backend = engine
        self._save_weights = save_weights
        self._memory: MemoryFolder | None = None

    def refresh(self) -> None:
        """Write the policy's weights for the engine to reload, which also invalidates its prompt cache."""
        # A folder in memory avoids writing the weights to disk at every step.
        self._memory = self._memory or MemoryFolder("spin-policy-")
        with tempfile.TemporaryDirectory(dir=self._memory.path) as folder:
            self._save_weights(Path(folder))
            self._backend.reload(folder)

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Generate with the engine."""
        return self._backend.generate(requests, sampling)

    def close(self) -> None:
        """Shut the engine down."""
        self._backend.close()
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
    """Return the sampler of this process for the policy ``model``, which was loaded from ``source``.

    Raises:
        InputError: the engine is not installed, or does not support the model.
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
        trust_remote_code=source.trust_remote_code,
        stop_ids=encoder.stop_ids,
        masked_ids=ids_without_token(encoder.tokenizer, causal.config),
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )
    if find_backend(args.backend).online == "engine":
        return EngineSampler(make_backend(args.backend, settings), lambda folder: save_weights(causal, folder, compute))
    return InPlaceSampler(model, settings, own_attention, precision)


def save_weights(model: Any, folder: Path, compute: str | None = None) -> None:
    """Save a module's weights to a folder as a model, in the precision ``compute`` (default: that of its configuration)."""
    import torch

    dtype = getattr(torch, compute or str(model.config.dtype or torch.float32).removeprefix("torch."))
    model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()})


__all__ = ["EngineSampler", "InPlaceSampler", "PolicySampler", "make_sampler", "save_weights"]
