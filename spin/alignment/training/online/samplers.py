"""Responses of the policy as it is now: from its own weights in memory, or from an engine that takes them over."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from spin.alignment.generation.base import BackendSettings, GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.logprobs.forward import use_attention


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


__all__ = ["EngineSampler", "InPlaceSampler", "PolicySampler"]
