"""Atomic file writes: to a temporary file in the same folder, fsynced, then renamed, so a file is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spin.alignment.core.errors import InputError

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")  # as named by atomic_file


@contextmanager
def atomic_file(
    path: str | Path, before_rename: Callable[[Path], None] | None = None, sync_folder: bool = True
) -> Iterator[BinaryIO]:
    """Open a temporary file next to ``path``; on a clean exit fsync and rename it, otherwise remove it.

    ``before_rename`` is called with the finished temporary file. Without ``sync_folder`` the rename is durable only with the next
    one in the same folder.

    Raises:
        InputError: the folder is not writable, or the disk is full; ``path`` is then unchanged.
    """
    path = Path(path)
    # Same folder, hence same file system: a rename across file systems is not atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explained_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if before_rename is not None:
                before_rename(temporary)
            temporary.replace(path)
            if sync_folder:
                fsync_folder(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def file_mode() -> int:
    """Return the mode of a new file: read and write for all that the umask admits."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 0o666 & ~int(text.partition("Umask:")[2].split()[0], 8)
    except (OSError, ValueError, IndexError):
        umask = os.umask(0o077)  # elsewhere the umask can only be read by setting it
        os.umask(umask)
        return 0o666 & ~umask


def share_files(folder: Path) -> None:
    """Give the files of a folder the mode that the umask says; safetensors writes them for their owner only."""
    mode = file_mode()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def explained_os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk while ``path`` is written into one sentence.

    Raises:
        InputError: the folder is not writable, or the disk is full; other errors are raised as they are.
    """
    try:
        yield
    except OSError as error:
        raise (_explained(error, path) or error) from None


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable; fsync of a file does not cover its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(*paths: Path) -> None:
    """Remove temporary files left by killed writers of ``paths``; only the sole writer of a file may call this."""
    for path in paths:
        remove_files(path.parent.glob(f".{path.name}.*.tmp"))


def remove_all_leftovers(folder: Path) -> None:
    """Remove the temporary files directly in a folder whose writers, processes of this machine, have ended."""
    names = ((path, _TEMPORARY.fullmatch(path.name)) for path in folder.iterdir())
    remove_files(path for path, found in names if found and not _is_process(int(found[1])))


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's; a number that is no pid belongs to no file of ours
    return True


def is_leftover(path: Path, target: Path) -> bool:
    """Return whether a file is a temporary one that a killed writer of ``target`` left."""
    return path.match(f".{target.name}.*.tmp") and path.parent == target.parent


def _explained(error: OSError, path: Path) -> InputError | None:
    if error.errno in FULL_ERRNOS:
        return InputError(f"no space left on the disk while writing {path}: free some and run the same command again")
    # ENOTDIR and EEXIST: a parent of the path is a file.
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return InputError(f"cannot write {path} ({error.strerror}): choose a folder you may write to")
    return None


# How libraries that write files themselves (safetensors, torch.save, Arrow) say that the disk is full.
_FULL_DISK = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
)
_FULL_DISK_TORCH = (
    *("PytorchStreamWriter failed writing file", "file write failed", "unexpected pos"),
    "iostream error",  # as it writes the end of a file
)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that a file could not be written for lack of space."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL_ERRNOS:
            return True
        if any(phrase in str(seen) for phrase in (*_FULL_DISK, *_FULL_DISK_TORCH)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file atomically: readers see all of the new content or all of the old."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write an indented JSON file atomically, keeping the order of keys."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise :class:`InputError` if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of opened brackets
        raise InputError(f"cannot read {path} as JSON ({error}): restore or remove the file") from error


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files, ignoring those that do not exist."""
    for path in list(paths):  # ``paths`` may be a glob that is still reading the folder
        path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see all of the old or of the new text, without waiting for the disk.

    For what may be lost when the power fails, such as a progress report.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
