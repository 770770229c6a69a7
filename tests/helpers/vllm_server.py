"""The server of vLLM, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import REPOSITORY, program_environment

CONTEXT = 64
_START_SECONDS = 240.0


@contextlib.contextmanager
def serving(model: Path, log: Path, *further: str, **environment: str) -> Iterator[str]:
    """Start the server of vLLM on a free port; yield its address; kill it with all its children at the end.

    ``further`` are flags, ``environment`` variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": CONTEXT}
    flags |= {"gpu-memory-utilization": 0.3, "generation-config": model}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *words]
    command += ["--enforce-eager", "--no-enable-chunked-prefill", *further]
    variables = program_environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", **environment)
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            end = time.monotonic() + _START_SECONDS
            while True:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)
