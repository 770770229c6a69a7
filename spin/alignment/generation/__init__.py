"""Generation backends. One package and one line here for each; heavy imports wait until a backend is created."""

from __future__ import annotations

from typing import Any

from spin.alignment.core.errors import InputError, lookup
from spin.alignment.generation.base import (
    BACKEND_SETTINGS,
    ENGINE_SETTINGS,
    Backend,
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


def _vllm_installed() -> None:
    from spin.alignment.generation.vllm.backend import check_installed

    check_installed()


def _vllm_adapter_obstacle(config: Any, rank: int) -> str | None:
    from spin.alignment.generation.vllm.backend import adapter_obstacle

    return adapter_obstacle(config, rank)


def _openai(settings: BackendSettings) -> GenerationBackend:
    from spin.alignment.generation.openai.backend import OpenAIBackend

    return OpenAIBackend(settings)


BACKENDS: dict[str, Backend] = {
    "transformers": Backend(_transformers, flush_every=64, holds_batch=True, online="own_module"),
    "vllm": Backend(
        _vllm,
        takes=frozenset(ENGINE_SETTINGS),
        online="engine",
        makes_processes=True,
        check_installed=_vllm_installed,
        adapter_obstacle=_vllm_adapter_obstacle,
    ),
    "openai": Backend(_openai, takes=frozenset({"token_ids"}), needs_server=True, online="server"),
}


def find_backend(name: str) -> Backend:
    """Return a backend and what it can do; an unknown name raises :class:`InputError` with the valid ones."""
    found = lookup(BACKENDS, name, "generation backend")
    return found if isinstance(found, Backend) else Backend(found)


def make_backend(name: str, settings: BackendSettings) -> GenerationBackend:
    """Load a model into a backend; an unknown name raises :class:`InputError` with the valid ones."""
    return find_backend(name)(settings)


def check_backend_settings(name: str, given: dict[str, Any], defaults: dict[str, Any] = BACKEND_SETTINGS) -> None:
    """Refuse settings that a backend would have to ignore.

    Args:
        given: settings by name; only those in ``defaults`` are checked.

    Raises:
        InputError: naming the setting and the backends that take it.
    """
    backend = find_backend(name)
    for setting, default in defaults.items():
        if setting in given and given[setting] != default and setting not in backend.takes:
            takers = ", ".join(other for other in BACKENDS if setting in find_backend(other).takes)
            raise InputError(
                f"{setting} is for {takers}: backend {name} does not use it, leave it at {default} or set backend to {takers}"
            )


__all__ = [
    "BACKENDS",
    "Backend",
    "BackendSettings",
    "GenerationBackend",
    "PromptRequest",
    "Response",
    "SamplingConfig",
    "check_backend_settings",
    "find_backend",
    "make_backend",
    "sample_seed",
]
