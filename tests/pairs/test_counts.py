"""The counts file of a split: read as it was written, or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.pairs.counts import COUNTS, counts_path, read_counts, write_counts
from tests.helpers import flipped

WRITTEN = dict(zip(COUNTS, (24, 3, 0, 3, 1, 21), strict=True))


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = counts_path(tmp_path, "train")
    write_counts(path, WRITTEN)
    assert read_counts(path) == WRITTEN
    whole = path.read_bytes()
    unnoticed = 0
    for place in range(8 * len(whole)):
        path.write_bytes(flipped(whole, place))
        try:
            assert read_counts(path) == WRITTEN  # a space became a tab, or a line break another
            unnoticed += 1
        except InputError as error:
            assert str(error).startswith(f"{path} is damaged: ")
    assert unnoticed < len(whole) // 2


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_counts(counts_path(tmp_path, "train"))


def test_a_file_of_an_earlier_version_is_taken_as_it_is(tmp_path: Path) -> None:
    path = counts_path(tmp_path, "train")
    path.write_text(json.dumps(WRITTEN))
    assert read_counts(path) == WRITTEN
    path.write_text(json.dumps(WRITTEN | {"xxh2": "0"}))  # the name of the checksum itself
    with pytest.raises(InputError, match="is damaged"):
        read_counts(path)
