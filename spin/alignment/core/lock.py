"""One writer per folder: a lock that the kernel releases when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import explained_os_errors, file_mode

LOCK_NAME = ".lock"
_POLL_SECONDS = 0.2


@contextmanager
def folder_lock(folder: str | Path, setting: str) -> Iterator[None]:
    """Create a folder and hold its lock: the file ``.lock`` in it, which names the holder and is removed at the end.

    A killed holder leaves the file behind but not the lock, so the next process can acquire it. On file systems without
    ``flock``, filelock uses the existence of the file as the lock and removes the file of a dead process.

    Args:
        setting: the setting that names the folder, such as ``output_dir``; for messages.

    Raises:
        InputError: another process holds the lock, or the folder cannot be created, written or locked.
    """
    path = Path(folder) / LOCK_NAME
    # Others who may write to a shared folder must be able to take over the lock of a process that was killed.
    lock = FileLock(path, mode=file_mode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)  # do not wait: a second run should be refused with a sentence
    except Timeout:
        raise InputError(
            f"{folder} is in use by {_recorded_holder(path)}: wait for it, or choose another {setting}"
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot lock {folder} ({error.strerror}): choose another {setting} on a disk that supports writing and locking"
        ) from error
    # With its fallback for file systems without flock, filelock writes the pid to the file itself and has the attribute.
    is_kernel_lock = getattr(lock, "pid", None) is None
    try:
        if is_kernel_lock:
            path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        if is_kernel_lock:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def waiting_lock(folder: Path, tell: Callable[[], None]) -> Iterator[None]:
    """Create a folder and hold its lock, as :func:`folder_lock`, but wait while another process holds it; the file stays.

    Args:
        tell: called once if there is a wait.

    Raises:
        InputError: the folder cannot be created, written or locked.
    """
    path = folder / LOCK_NAME
    lock = FileLock(path, mode=file_mode())
    try:
        with explained_os_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                tell()
                lock.acquire(poll_interval=_POLL_SECONDS)
    except OSError as error:
        raise InputError(f"cannot lock {folder} ({error.strerror}): use a disk that supports locking") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: str | Path) -> bool:
    """Return whether a live process holds the lock of a folder; works without write access to it."""
    path = Path(folder) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock_descriptor(descriptor, blocking=False)
    except OSError:
        return True  # no flock on this file system: the existence of the file is the lock
    finally:
        os.close(descriptor)


def _recorded_holder(path: Path) -> str:
    try:
        return f"process {int(path.read_text().split()[0])}"
    except (OSError, ValueError, IndexError):  # the holder is still writing its pid
        return "another process"
