"""Kills an engine's processes when the program that started them ends, however it ends.

vLLM's engine core outlives a killed program and keeps its device memory. A guard process holds the reading end of a pipe, which
is closed when the program ends. Run as a program, this file is that guard; it needs only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

MARK = "SPIN_ENGINE"
_LOOK_SECONDS = 0.05
_GIVE_UP_SECONDS = 20.0


class EngineGuard:
    """Marks all processes started from now on through their environment, and kills them when this process ends."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        # -I: files next to this one must not shadow the standard library. A new session, so that Ctrl-C does not reach it.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", __file__, self.mark], stdin=subprocess.PIPE, start_new_session=True
        )
        os.environ[MARK] = self.mark

    def close(self) -> None:
        """Kill the remaining processes of the engine, and end the guard."""
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
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def main() -> None:
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])


def kill_marked(mark: str) -> None:
    """Kill the processes with a mark, and those they start meanwhile.

    The environment of a process is empty for a moment while it is being started, so one look may miss it: the search ends
    after two looks in a row that find nothing, or after 20 seconds if a process cannot be killed.
    """
    empty_looks, deadline = 0, time.monotonic() + _GIVE_UP_SECONDS
    while empty_looks < 2 and time.monotonic() < deadline:
        found = marked_processes(mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        empty_looks = 0 if found else empty_looks + 1
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    main()
