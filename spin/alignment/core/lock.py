"""One writer per folder: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from spin.alignment.core.errors import InputError

LOCK_NAME = ".lock"


@contextmanager
def folder_lock(folder: str | Path, setting: str) -> Iterator[None]:
    """Make a folder and hold its lock, the file ``.lock`` in it, which says whose it is and is removed at the end.

    A killed holder leaves the file but not the lock, so the next process takes it over. Where the file system knows no
    locks (``flock`` is not implemented) filelock makes the file itself the lock and removes that of a dead process.

    Args:
        setting: what the folder is called where the user chose it, such as ``output_dir``; for messages.

    Raises:
        InputError: another process holds the lock, or the folder cannot be made, written or locked.
    """
    path = Path(folder) / LOCK_NAME
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{folder} is in use by {_recorded_holder(path)}: wait for it, or choose another {setting}"
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot lock {folder} ({error.strerror}): choose another {setting} on a writable disk that supports locks"
        ) from error
    # filelock itself writes down who holds the substitute for a lock; only there it knows a pid.
    is_kernel_lock = getattr(lock, "pid", None) is None
    try:
        if is_kernel_lock:
            path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        if is_kernel_lock:
            path.unlink(missing_ok=True)
        lock.release()


def is_locked(folder: str | Path) -> bool:
    """Return whether a living process holds the lock of a folder, which may be one that we cannot write to."""
    path = Path(folder) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock_descriptor(descriptor, blocking=False)
    except OSError:
        return True  # no locks here: the file is the lock
    finally:
        os.close(descriptor)


def _recorded_holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text().split()[0])}"
    except (OSError, ValueError, IndexError):  # the holder is just writing it down
        return "another process"
