"""One ``spin run`` per directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spin.alignment.core.lock import folder_lock
from spin.alignment.pipeline.processes import end_processes, orphans


@contextmanager
def run_lock(run_dir: str | Path) -> Iterator[None]:
    """Hold a run directory. Programs that outlived a killed holder are ended first: they would write into the same files.

    Raises:
        InputError: another run holds the directory, or it cannot be written.
    """
    with folder_lock(run_dir, setting="run_dir"):
        end_processes(orphans(Path(run_dir)))
        yield
