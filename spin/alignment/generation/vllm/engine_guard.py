"""Ends an engine's processes when the program that started them is gone, however it went.

vLLM's engine core outlives a program that is killed, and keeps the device's memory. A guard process holds the reading end of a
pipe: when the program ends, the pipe does too. Run as a program, this file is that guard; it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

MARK = "SPIN_ENGINE"


class EngineGuard:
    """Marks all processes that are started from now on, and has them ended with this one."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # -I: nothing beside this file may shadow the standard library. A session of its own, out of reach of Ctrl-C.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", __file__, self.mark], stdin=subprocess.PIPE, start_new_session=True
        )
        os.environ[MARK] = self.mark

    def close(self) -> None:
        """End what is left of the engine's processes, and the guard."""
        os.environ.pop(MARK, None)
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


def marked_processes(mark: str) -> list[int]:
    """Return the processes that were started with the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def main() -> None:
    sys.stdin.buffer.read()
    for pid in marked_processes(sys.argv[1]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
