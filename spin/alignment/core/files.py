"""Files that are complete or absent: written beside their place, fsynced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spin.alignment.core.errors import InputError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; at a clean exit fsync and rename it, otherwise remove it.

    Raises:
        InputError: the folder cannot be written, or the disk is full. ``path`` is then as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise (_explained(error, path) or error) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files that killed writers of ``paths`` left; only for a file's one writer to call."""
    for path in paths:
        remove_files(path.parent.glob(f".{path.name}.*.tmp"))


def is_leftover(path: Path, target: Path) -> bool:
    """Return whether a file is a temporary one that a killed writer of ``target`` left."""
    return path.match(f".{target.name}.*.tmp") and path.parent == target.parent


def _explained(error: OSError, path: Path) -> InputError | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"no space left on the disk while writing {path}: free some and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return InputError(f"cannot write {path} ({error.strerror}): choose a folder you may write to")
    return None


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file: the whole new content appears, or the old one stays."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write an indented JSON file atomically; keys keep their order."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise :class:`InputError` when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON ({error}): restore or remove the file") from error


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that may be gone already."""
    for path in list(paths):
        path.unlink(missing_ok=True)
