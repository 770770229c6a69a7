"""The counts file of a split: its rows by outcome, with a checksum of its own.

``{split}_prefs.counts.json`` is renamed last and thereby proves that the pairs are complete.
"""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.checked_json import read_checked_json, write_checked_json
from spin.alignment.core.errors import InputError

_FIX = "run the same conversion again, which writes the pairs again"
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
    write_checked_json(path, counts)


def read_counts(path: Path) -> dict[str, int]:
    """Return the counts.

    Raises:
        InputError: the file is missing, or it is not what was written.
    """
    found = read_checked_json(path, _FIX)
    if not all(type(value) is int for value in found.values()):
        raise InputError(f"{path} is damaged: {_FIX}")
    return found
