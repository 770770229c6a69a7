"""The server of vLLM in a process of its own, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spin.alignment.core.errors import InputError

START_SECONDS = 300.0


@contextlib.contextmanager
def serving(
    model: Path, log: Path, flags: Sequence[str], environment: Mapping[str, str], prefix: Sequence[str] = ()
) -> Iterator[str]:
    """Start the server on a free port of this machine, in float32; yield its address; kill it with all its children at the end.

    Args:
        log: the file for its output.
        flags: further ones.
        prefix: a command that starts the command it is given.

    Raises:
        InputError: it does not start; the message ends with its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*prefix, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", *flags]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env={**environment, "VLLM_NO_USAGE_STATS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                if server.poll() is not None or time.monotonic() > end:
                    raise InputError(f"the server of vLLM does not start: {log.read_text(errors='replace')[-4000:]}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)
