"""Scores of models on disk, by content: what was scored once is not scored again, whoever asks.

A folder ``{scorer}-{hash of what decides its scores}`` holds one file of JSON lines for each process that wrote. A process
appends to its own file only, so several never meet, on a shared file system too, and a killed one loses at most its last line.
What another process adds later is not seen, which costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from spin.alignment.core.errors import InputError

_HASH_LENGTH = 32


def content_key(*parts: object) -> str:
    """Return a hash of anything JSON can write: texts, ids, lists of them."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:_HASH_LENGTH]


def check_cache_dir(cache_dir: str | None) -> None:
    """Raise :class:`InputError` unless the folder can be made and written; it is not made yet."""
    if cache_dir is None:
        return
    folder = Path(cache_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"score_cache {cache_dir} cannot be written: choose a folder you may write to")


class ScoreCache:
    """Numbers by key. Without a folder nothing is kept."""

    def __init__(self, cache_dir: str | None, scorer: str, *identity: object) -> None:
        """Read what is there.

        Args:
            cache_dir: root of all caches.
            scorer: its name.
            identity: everything else that decides a score: hash of the weights, precision, name of a served model.

        Raises:
            InputError: a file is damaged.
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
        """Keep some scores; they are on disk when this returns.

        Raises:
            InputError: the folder cannot be written, or the disk is full.
        """
        values = dict(values)
        if self._folder is None or not values:
            return
        self._values.update(values)
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = (self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl").open("x", encoding="utf-8")
            self._file.writelines(json.dumps([key, value]) + "\n" for key, value in values.items())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot keep scores in {self._folder} ({error.strerror}): free some space or choose another score_cache"
            ) from error

    def close(self) -> None:
        """Close the file of this process. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _read(path: Path) -> Iterator[tuple[str, float]]:
    """Yield the entries of one file; a last line without its end is what a killed process was writing."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                key, value = json.loads(line)
                yield str(key), float(value)
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"line {number} of {path} is damaged: remove the file, and what it holds is scored again"
                ) from error
