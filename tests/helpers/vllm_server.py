"""The server of vLLM as the tests start it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks import vllm_server
from tests.helpers import program_environment

CONTEXT = 64


def serving(model: Path, log: Path, *further: str, **environment: str) -> AbstractContextManager[str]:
    """Start a server with the sampling defaults of the model's folder (see :func:`benchmarks.vllm_server.serving`).

    ``further`` are flags, ``environment`` variables.
    """
    flags = ["--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.3", "--generation-config", str(model)]
    variables = program_environment(VLLM_CPU_KVCACHE_SPACE="1", **environment)
    return vllm_server.serving(model, log, [*flags, *further], variables)
