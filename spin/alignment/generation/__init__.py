"""Where responses come from. One package and one line here for each backend; heavy imports wait until it is made."""

from __future__ import annotations

from collections.abc import Callable

from spin.alignment.core.errors import lookup
from spin.alignment.generation.base import (
    BackendSettings,
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    sample_seed,
)


def _transformers(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.transformers.backend import TransformersBackend

    return TransformersBackend(settings)


def _vllm(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.vllm.backend import VLLMBackend

    return VLLMBackend(settings)


def _openai(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.openai.backend import OpenAIBackend

    return OpenAIBackend(settings)


BACKENDS: dict[str, Callable[[BackendSettings], GenerationBackend]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "openai": _openai,
}


def make_backend(name: str, settings: BackendSettings) -> GenerationBackend:
    """Load a model into a backend; an unknown name raises :class:`InputError` with the valid ones."""
    return lookup(BACKENDS, name, "generation backend")(settings)


__all__ = [
    "BACKENDS",
    "BackendSettings",
    "GenerationBackend",
    "PromptRequest",
    "Response",
    "SamplingConfig",
    "make_backend",
    "sample_seed",
]
