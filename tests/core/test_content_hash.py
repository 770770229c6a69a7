"""Content hashes: any flipped bit, any cut and any missing file is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin.alignment.core.content_hash import (
    HASHES_FILE,
    damaged_file,
    is_damaged,
    remove_sealed,
    seal_path,
    sealed_file,
    write_hashes,
)
from tests.helpers import flipped

CONTENT = b"some rows of a store"


def write(path: Path, content: bytes = CONTENT) -> Path:
    with sealed_file(path) as file:
        file.write(content)
    return path


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "store.arrow")
    assert path.read_bytes() == CONTENT
    assert not is_damaged(path)
    for place in range(8 * len(CONTENT)):
        path.write_bytes(flipped(CONTENT, place))
        assert is_damaged(path)
    for length in range(len(CONTENT)):
        path.write_bytes(CONTENT[:length])
        assert is_damaged(path)


def test_a_damaged_or_empty_seal_counts_as_damage_and_a_missing_one_as_an_earlier_version(tmp_path: Path) -> None:
    path = write(tmp_path / "store.arrow")
    for content in (b"", b"0" * 32, seal_path(path).read_bytes()[:-1]):
        seal_path(path).write_bytes(content)
        assert is_damaged(path)
    seal_path(path).unlink()
    assert not is_damaged(path)


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """The seal is written first: a kill before the rename leaves a file that does not match it, which counts as damaged."""
    path = tmp_path / "store.arrow"
    with pytest.raises(KeyboardInterrupt), sealed_file(path) as file:
        file.write(CONTENT)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(path)
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert not is_damaged(path)
    remove_sealed([path, tmp_path / "missing"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_names_its_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.bin", "deep/b.bin"):
        (tmp_path / name).write_bytes(name.encode())
    assert damaged_file(tmp_path) is None  # an earlier version wrote no hashes
    write_hashes(tmp_path)
    assert damaged_file(tmp_path) is None
    (tmp_path / "deep/b.bin").write_bytes(flipped(b"deep/b.bin", 11))
    assert damaged_file(tmp_path) == "deep/b.bin"
    (tmp_path / "deep/b.bin").unlink()
    assert damaged_file(tmp_path) == "deep/b.bin"
    for content in ("", "[]", json.dumps({"a.bin": "0"})):
        (tmp_path / HASHES_FILE).write_text(content)
        assert damaged_file(tmp_path) in (HASHES_FILE, "a.bin")
