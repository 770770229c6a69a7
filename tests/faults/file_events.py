"""Every file operation of this process below a folder, counted, and a fault at one of them.

The operations are those by which data reaches a disk: mkdir, open (for writing), write, fsync, rename, unlink, rmdir. They are
seen in Python: by audit hooks, and by wrapping ``open`` and ``os.fsync``. Writes of native libraries (safetensors, torch.save)
are seen as the operations around them; tests of a full disk also limit the size of files, which native code feels too.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

How = Literal["kill", "full"]
_AUDITED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# A full disk does not prevent a removal.
NEEDS_SPACE = ("mkdir", "open", "write", "fsync", "rename")
# Process numbers and random hexadecimal digits in names of temporary files.
_RANDOM = re.compile(r"\d+-[0-9a-f]{8}|[0-9a-f]{8,16}|-\d{3,}-[0-9a-f]{6}")


@dataclass
class FileEvents:
    """Counts the operations below ``root``. At number ``at`` the process dies, or the disk is full from then on."""

    root: Path
    at: int | None = None
    how: How = "kill"
    seen: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Begin; there is no way back, so call it in a process of its own."""
        self.root = self.root.resolve()
        sys.addaudithook(self._audit)
        os.fsync, self._fsync = self._counted_fsync, os.fsync
        self._open = io.open
        builtins.open = io.open = self._counted_open

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = _AUDITED.get(event)
        if event == "open":
            kind = "open" if isinstance(arguments[2], int) and arguments[2] & _WRITING else None
        if kind is not None and (path := self._path(arguments, event)):
            self._note(kind, path)

    def _path(self, arguments: tuple[Any, ...], event: str) -> str | None:
        name = arguments[0]
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if not isinstance(name, str | os.PathLike):
            return None
        folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1  # shutil.rmtree works inside open folders
        inside = isinstance(folder, int) and folder >= 0
        base = Path(f"/proc/self/fd/{folder}").readlink() if inside else Path.cwd()
        return self._below_root(os.path.normpath(base / name))

    def _below_root(self, path: str) -> str | None:
        root = str(self.root)
        return path[len(root) :].lstrip("/") or "." if path == root or path.startswith(f"{root}/") else None

    def _note(self, kind: str, path: str, torn: Any = None) -> None:
        """Count an operation that is about to happen; ``torn()`` does a part of it before the process is killed."""
        number = len(self.seen)
        self.seen.append(f"{kind} {_RANDOM.sub('*', path)}")
        if self.at is None or number < self.at:
            return
        if self.how == "full" and kind in NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.how == "kill":
            if torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted_fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if path := self._below_root(str(Path(f"/proc/self/fd/{number}").readlink())):
            self._note("fsync", path)
        self._fsync(descriptor)

    def _counted_open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        name = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else None
        writes = any(letter in mode for letter in "wax") and "+" not in mode
        if (
            name is None
            or not writes
            or opener is not None
            or self._below_root(os.path.normpath(Path.cwd() / name)) is None
        ):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _CountedFile(name, mode.replace("b", "").replace("t", ""), self)
        if buffering == 0:
            return raw
        stream = io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)


class _CountedFile(io.FileIO):
    """A file opened for writing whose writes are counted."""

    def __init__(self, name: str, mode: str, events: FileEvents) -> None:
        super().__init__(name, mode)
        self._events = events

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        path = self._events._below_root(os.path.normpath(Path.cwd() / str(self.name)))
        parent = super()
        if path is not None and len(view):
            self._events._note("write", path, lambda: parent.write(view[: len(view) // 2]))
        return parent.write(data)
