"""Where responses come from. One file and one line here for each backend; heavy imports wait until it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spin.alignment.configs import Dtype
from spin.alignment.errors import lookup
from spin.alignment.generation.base import (
    GenerationBackend,
    PromptRequest,
    Response,
    SamplingConfig,
    sample_seed,
)


@dataclass(frozen=True)
class BackendSettings:
    """What a backend needs to load a model.

    Attributes:
        adapter: folder of LoRA adapters to serve on top of the model.
        dtype: auto (that of the checkpoint), float32, bfloat16 or float16.
        batch_size: responses in flight; None leaves it to the backend.
        max_model_len: the longest prompt plus response, in tokens.
        stop_ids: the ids that end a response.
        decode: sampled ids -> text; stop texts are looked for in it.
        batch_invariant: let the engine compute every response the same in any batch (vllm on an H100 or newer; slower).
        base_url: address of an OpenAI-compatible server (openai).
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    dtype: Dtype = "auto"
    batch_size: int | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    stop_ids: list[int] = field(default_factory=list)
    pad_id: int = 0
    decode: Callable[[Sequence[int]], str] | None = None
    batch_invariant: bool = False
    base_url: str | None = None


def _transformers(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.transformers_backend import TransformersBackend

    return TransformersBackend(settings)


def _vllm(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.vllm_backend import VLLMBackend

    return VLLMBackend(settings)


def _openai(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.openai_backend import OpenAIBackend

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
