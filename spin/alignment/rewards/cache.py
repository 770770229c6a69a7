"""A cache of model scores on disk, keyed by content, so that nothing is scored twice.

A folder ``{scorer}-{hash of what decides its scores}`` contains one file of JSON lines for each process that wrote to it. A
process appends only to its own file, so several do not conflict, even on a shared file system, and a killed process loses at
most its last line. Scores that another process adds later are not seen, which only costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError

_HASH_LENGTH = 32  # hexadecimal digits: 128 bits, so that millions of keys do not collide


def content_key(*parts: object) -> str:
    """Return a hash of any JSON values: texts, ids, lists of them."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:_HASH_LENGTH]


def check_cache_dir(cache_dir: str | None) -> None:
    """Raise :class:`InputError` unless the folder can be created and written to; it is not created yet."""
    if cache_dir is None:
        return
    folder = Path(cache_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"score_cache {cache_dir} cannot be written: choose a folder you may write to")


class ScoreCache:
    """Numbers by key; without a folder, none are stored."""

    def __init__(self, cache_dir: str | None, scorer: str, *identity: object) -> None:
        """Read the existing entries.

        Args:
            cache_dir: root folder of all caches.
            scorer: name of the scorer.
            identity: everything else that affects a score: hash of the weights, precision, name of a served model.

        Damaged entries are left out, and said to be: they are scored again.
        """
        self._values: dict[str, float] = {}
        self._file: TextIO | None = None
        self._folder = Path(cache_dir) / f"{scorer}-{content_key(*identity)[:16]}" if cache_dir else None
        if self._folder is not None:
            for path in sorted(self._folder.glob("*.jsonl")):
                self._values.update(_read(path))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> float:
        return self._values[key]

    def add(self, values: Mapping[str, float] | Iterable[tuple[str, float]]) -> None:
        """Store some scores; they are on disk when this returns.

        Raises:
            InputError: the folder is not writable, or the disk is full.
        """
        values = dict(values)
        if self._folder is None or not values:
            return
        self._values.update(values)
        try:
            if self._file is None:  # a new file per process: appending to an existing one could follow a torn line
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = (self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl").open("x", encoding="utf-8")
            self._file.writelines(_line(key, value) for key, value in values.items())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write scores to {self._folder} ({error.strerror}): free some space or choose another score_cache"
            ) from error

    def close(self) -> None:
        """Close the file of this process. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(key: str, value: float) -> str:
    """One entry as a line of JSON, with a checksum of what is before it."""
    content = json.dumps([key, value])
    return f"{content[:-1]}, {zlib.crc32(content.encode())}]\n"


def _entry(line: str) -> tuple[str, float]:
    """Return the entry of a line; raise ValueError or TypeError if it is damaged. Earlier versions wrote no checksum."""
    key, value, *checksum = json.loads(line)
    if not isinstance(key, str) or not isinstance(value, int | float) or len(checksum) > 1:
        raise TypeError("not an entry")
    if checksum and _line(key, value) != line:
        raise ValueError("the checksum differs")
    return key, float(value)


def _read(path: Path) -> Iterator[tuple[str, float]]:
    """Yield the entries of one file; a last line without a newline was being written by a killed process and is ignored."""
    damaged = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            try:
                yield _entry(line)
            except (ValueError, TypeError, RecursionError):
                damaged += 1
    if damaged:
        say_error(f"{path}: {damaged} entries are damaged and will be scored again")
