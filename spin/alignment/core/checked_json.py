"""JSON records with a checksum of their own: whether a disk, a copy or a network has changed them since they were written.

The last key, ``xxh3``, is the XXH3 (128 bits) of the others as compact JSON. Unlike a sealed file (``content_hash``), such a
record is one file, so that it can be replaced atomically. Records of earlier versions lack the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic

CHECKSUM = "xxh3"


def write_checked_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record with its checksum, atomically."""
    write_json_atomic(path, dict(record) | {CHECKSUM: _checksum(record)})


def read_checked_json(path: Path, fix: str) -> dict[str, Any]:
    """Return a record without its checksum.

    Raises:
        InputError: the file is missing, or it is not what was written; the message ends with ``fix``.
    """
    damaged = InputError(f"{path} is damaged: {fix}")
    try:
        found = read_json(path)
    except InputError as error:
        raise damaged if path.exists() else error from None
    if not isinstance(found, dict):
        raise damaged
    if CHECKSUM in found:
        expected = found.pop(CHECKSUM)
        if expected != _checksum(found):
            raise damaged
    elif found:  # of an earlier version, unless it is the checksum's own name that is damaged
        last = next(reversed(found))
        if found[last] == _checksum({key: value for key, value in found.items() if key != last}):
            raise damaged
    return found


def _checksum(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, separators=(",", ":")).encode())
