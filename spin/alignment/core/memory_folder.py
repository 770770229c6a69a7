"""A folder in memory that is removed when its process ends, however it ends.

Files in ``/dev/shm`` outlive a process that is killed and keep their memory. A guard process holds the reading end of a pipe,
which the kernel closes when the process ends. Run as a program, this file is that guard; it needs only the standard library.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEMORY = Path("/dev/shm")
_FRESH_SECONDS = 60.0  # a folder this new may not be locked by its owner yet


class MemoryFolder:
    """A new folder in memory (or among the temporary files, without ``/dev/shm``), owned by this process.

    Folders of the same prefix that a killed process and its killed guard have left are removed first.
    """

    def __init__(self, prefix: str) -> None:
        from spin.alignment.core.lock import folder_lock

        parent = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
        remove_abandoned(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # -I: files next to this one must not shadow the standard library. A new session, so that Ctrl-C does not reach it.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(folder_lock(self.path, setting="TMPDIR"))

    def close(self) -> None:
        """Remove the folder and end the guard. May be called twice."""
        self._lock.close()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders of a prefix whose owner no longer runs; those of other users stay."""
    from spin.alignment.core.lock import is_locked

    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            is_fresh = abs(time.time() - folder.stat().st_mtime) < _FRESH_SECONDS
            if folder.is_dir() and not is_fresh and not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Wait until the owner has ended, then remove its folder."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # only the end of the owner ends the guard
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
