"""The counts file of a split: its rows by outcome, with a checksum of its own.

``{split}_prefs.counts.json`` is renamed last and thereby proves that the pairs are complete. Its last key, ``xxh3``, is the XXH3
(128 bits) of the counts as compact JSON; files of earlier versions lack it.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic

CHECKSUM = "xxh3"
COUNTS = ("rows", "identical", "truncated", "dropped", "skipped", "written")
# When responses are scored: also responses for which the scorer failed, and prompts without a pair.
SCORED_COUNTS = ("rows", "failed", "ties", *COUNTS[1:])
# When each pair takes two responses: also those left over after the scorer failed on some.
EVEN_COUNTS = (*SCORED_COUNTS[:3], "unpaired", *COUNTS[1:])


def counts_path(folder: Path, split: str) -> Path:
    """Return the counts file of a split in a folder of pairs."""
    return folder / f"{split}_prefs.counts.json"


def counts_of_folder(folder: Path) -> dict[str, dict[str, int]]:
    """Return the counts of every split in a folder of pairs, by split; damaged files are left out."""
    found = {}
    for path in sorted(folder.glob("*_prefs.counts.json")):
        try:
            found[path.name.rpartition("_prefs")[0]] = read_counts(path)
        except InputError:
            continue
    return found


def write_counts(path: Path, counts: dict[str, int]) -> None:
    """Write the counts with their checksum."""
    write_json_atomic(path, counts | {CHECKSUM: _checksum(counts)})


def read_counts(path: Path) -> dict[str, int]:
    """Return the counts.

    Raises:
        InputError: the file is missing, or it is not what was written.
    """
    damaged = InputError(f"{path} is damaged: run the same conversion again, which writes the pairs again")
    try:
        found = read_json(path)
    except InputError as error:
        raise damaged if path.exists() else error from None
    if not isinstance(found, dict):
        raise damaged
    expected = found.pop(CHECKSUM, None)
    # Without a checksum every value is a number: the name of the checksum itself may be damaged.
    if not all(type(value) is int for value in found.values()):
        raise damaged
    if expected not in (None, _checksum(found)):
        raise damaged
    return found


def _checksum(counts: dict[str, int]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(counts, separators=(",", ":")).encode())
