"""One run per directory: the lock of a run directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.processes import end_processes, orphans


class RunLock:
    """One ``spin run`` per directory (a context manager). The kernel drops the lock of a dead holder.

    Children of a holder that was killed are ended first: they would write into the same files.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / ".lock"

    def __enter__(self) -> RunLock:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise InputError(
                f"{self.run_dir} is in use by process {holder}: wait for it, or choose another run_dir"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        end_processes(orphans(self.run_dir))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @staticmethod
    def is_held(run_dir: str | Path) -> bool:
        """Return whether a living ``spin run`` holds the directory."""
        path = Path(run_dir) / ".lock"
        if not path.exists():
            return False
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
