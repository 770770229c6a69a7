"""Responses of the policy as it is now: from its own weights in memory, or from an engine that takes them over."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.generation import find_backend, make_backend
from spin.alignment.generation.base import BackendSettings, GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.logprobs.forward import use_attention
from spin.alignment.models.config import ModelConfig

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.training.online.config import OnlineConfig


class PolicySampler(ABC):
    """Draws responses from the policy; the weights are those of the moment of :meth:`refresh`."""

    @abstractmethod
    def refresh(self) -> None:
        """Take over the policy's weights."""

    @abstractmethod
    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Return ``num_samples`` responses to each request, in order."""

    @abstractmethod
    def close(self) -> None:
        """Free what the sampler holds beside the policy."""


class InPlaceSampler(PolicySampler):
    """The policy's own module decodes: nothing is copied, so there is nothing to refresh."""

    def __init__(
        self,
        model: Any,
        settings: BackendSettings,
        own_attention: str,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """``own_attention`` is the attention the model had before rows were packed; ``precision`` that of training."""
        self._model, self._settings, self._own, self._precision = model, settings, own_attention, precision
        self._backend: GenerationBackend | None = None

    def refresh(self) -> None:
        """Do nothing: the weights are the policy's."""

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Decode in evaluation mode and in the precision of training, then put the module back as it was."""
        from spin.alignment.generation.transformers.backend import TransformersBackend

        was_training = self._model.training
        before = use_attention(self._model, self._own)
        self._model.eval()
        try:
            with self._precision():
                if self._backend is None:
                    self._backend = TransformersBackend(self._settings, self._model)
                return self._backend.generate(requests, sampling)
        finally:
            use_attention(self._model, before)
            self._model.train(was_training)

    def close(self) -> None:
        """Forget the module; its owner frees it."""
        self._backend = None


class EngineSampler(PolicySampler):
    """An engine beside the policy, in every process; its weights are reloaded in place from a folder in memory."""

    def __init__(self, engine: Any, save_weights: Callable[[Path], None]) -> None:
        """``engine`` is a backend with ``reload(folder)``; ``save_weights`` writes the policy into a folder as a model."""
        self._backend = engine
        self._save_weights = save_weights

    def refresh(self) -> None:
        """Write the policy's weights and let the engine read them; its cached prompts belong to the old ones."""
        shared_memory = Path("/dev/shm")
        parent = str(shared_memory) if shared_memory.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="spin-policy-", dir=parent) as folder:
            self._save_weights(Path(folder))
            self._backend.reload(folder)

    def respond(self, requests: Sequence[PromptRequest], sampling: SamplingConfig) -> list[list[Response]]:
        """Let the engine answer."""
        return self._backend.generate(requests, sampling)

    def close(self) -> None:
        """Shut the engine down."""
        self._backend.close()


def make_sampler(
    model: Any,
    source: ModelConfig,
    args: OnlineConfig,
    encoder: ChatEncoder,
    own_attention: str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> PolicySampler:
    """Return what draws the responses of this process from the policy ``model``, which was loaded from ``source``.

    Raises:
        InputError: the engine is not installed, or does not serve the model.
    """
    settings = BackendSettings(
        model=source.model_name_or_path,
        revision=source.model_revision,
        dtype=source.dtype,
        batch_size=args.generation_batch_size,
        max_model_len=args.max_prompt_length + args.max_new_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        trust_remote_code=source.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        decode=encoder.decode,
    )
    if find_backend(args.backend).online == "engine":
        return EngineSampler(make_backend(args.backend, settings), lambda folder: save_weights(model, folder))
    return InPlaceSampler(model, settings, own_attention, precision)


def save_weights(model: Any, folder: Path) -> None:
    """Write a module's weights into a folder as a model, in the precision that its configuration names."""
    import torch

    dtype = getattr(torch, str(model.config.dtype or torch.float32).removeprefix("torch."))
    model.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in model.state_dict().items()})


__all__ = ["EngineSampler", "InPlaceSampler", "PolicySampler", "make_sampler", "save_weights"]
