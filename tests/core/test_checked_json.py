"""A JSON record with a checksum of its own: any flipped bit is noticed, and records of earlier versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin.alignment.core.checked_json import read_checked_json, write_checked_json
from spin.alignment.core.errors import InputError
from tests.helpers import flipped

RECORD = {"model": "0a" * 16, "beta": 0.1, "splits": ["train"], "größe": None}


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_checked_json(path, RECORD)
    whole = path.read_bytes()
    assert read_checked_json(path, "restore it") == RECORD
    assert list(json.loads(whole))[-1] == "xxh3"
    unnoticed = []
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        try:
            found = read_checked_json(path, "restore it")
        except InputError as error:
            assert str(error) == f"{path} is damaged: restore it"
        else:
            assert found == RECORD  # white space between the values
            unnoticed.append(bit)
    assert len(unnoticed) < len(whole)


@pytest.mark.parametrize("content", ["", "[1]", "{", '"text"', "[" * 100_000])
def test_another_kind_of_content_is_damage(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"record\.json is damaged: restore it"):
        read_checked_json(path, "restore it")


def test_records_of_earlier_versions_and_missing_ones(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(InputError, match="cannot read"):
        read_checked_json(path, "restore it")
    for record in (RECORD, {}):
        path.write_text(json.dumps(record))
        assert read_checked_json(path, "restore it") == record
