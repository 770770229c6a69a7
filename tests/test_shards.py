"""Fractions, atomic files and the parts of a fraction."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin.alignment import shards
from spin.alignment.errors import InputError
from spin.alignment.provenance import Provenance, read_provenance
from spin.alignment.shards import (
    FractionParts,
    ParquetSink,
    atomic_file,
    fraction_path,
    fraction_rows,
    num_fractions,
    open_parquet,
    read_json,
    read_rows,
    read_skipped,
    remove_leftovers,
    write_json_atomic,
)

SCHEMA = pa.schema([("prompt_id", pa.string()), ("value", pa.int64())])
MADE = Provenance("generated", model="m", num_prompts=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def rows(*ids: str) -> list[dict]:
    return [{"prompt_id": name, "value": index} for index, name in enumerate(ids)]


@given(num_rows=st.integers(0, 300), frac_len=st.integers(0, 120))
def test_fractions_are_disjoint_and_cover_the_data(num_rows, frac_len):
    parts = [fraction_rows(num_rows, number, frac_len) for number in range(num_fractions(num_rows, frac_len))]
    assert sorted(index for part in parts for index in part) == list(range(num_rows))
    assert all(len(part) == frac_len for part in parts[:-1])


def test_fractions_are_the_slices_of_the_seed_42_shuffle():
    order = list(range(10))
    random.Random(42).shuffle(order)
    assert [fraction_rows(10, number, 4) for number in range(3)] == [order[:4], order[4:8], order[8:]]
    assert fraction_rows(10, 0, 0) == order


@pytest.mark.parametrize(
    ("data_frac", "frac_len", "message"),
    [(3, 4, "fractions 0 to 2"), (-1, 4, "data_frac is -1"), (0, -4, "frac_len is -4"), (1, 0, "fractions 0 to 0")],
)
def test_fractions_out_of_range_are_refused(data_frac, frac_len, message):
    with pytest.raises(InputError, match=message):
        fraction_rows(10, data_frac, frac_len)


def test_sink_appears_complete_with_its_provenance_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.parquet"
    with ParquetSink(path, SCHEMA, MADE, [{"prompt_id": "x", "reason": "too long"}]) as sink:
        sink.write(rows("a", "b"))
        sink.write(pa.Table.from_pylist(rows("c")))
        assert not path.exists()
    assert [row["prompt_id"] for row in read_rows(path)] == ["a", "b", "c"]
    assert read_provenance(open_parquet(path).schema_arrow, path) == MADE
    assert read_skipped(path) == [{"prompt_id": "x", "reason": "too long"}]
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), ParquetSink(path, SCHEMA, MADE) as sink:
        sink.write(rows("d"))
        raise RuntimeError("stop")
    assert path.read_bytes() == before and names(path.parent) == ["a.parquet"]


def test_full_disk_and_unwritable_folder_are_named_and_leave_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.parquet"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(InputError, match="no space left on the disk while writing"),
        ParquetSink(path, SCHEMA, MADE) as sink,
    ):
        sink.write(rows("a"))
    assert path.read_text() == "old" and names(tmp_path) == ["a.parquet"]
    with pytest.raises(InputError, match=r"cannot write .*choose a folder you may write to"):
        write_json_atomic(path / "below" / "b.json", {})


def test_streaming_holds_one_row_group_however_long_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2**20)
    noise = random.Random(0)
    with ParquetSink(tmp_path / "a.parquet", SCHEMA, MADE) as sink:
        for _ in range(40):
            sink.write([{"prompt_id": noise.randbytes(500).hex(), "value": index} for index in range(1000)])
    assert (tmp_path / "a.parquet").stat().st_size > 16 * 2**20
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in read_rows(tmp_path / "a.parquet", 100))
    assert peak < 8 * 2**20


def test_leftovers_of_a_killed_writer_are_removed_and_others_kept(tmp_path):
    for name in (".a.json.77-0123abcd.tmp", ".b.json.77-0123abcd.tmp", "a.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.json")
    assert names(tmp_path) == [".b.json.77-0123abcd.tmp", "a.json"]


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_parquet(tmp_path / "a.parquet")
    torn = tmp_path / "torn.parquet"
    with ParquetSink(torn, SCHEMA, MADE) as sink:
        sink.write(rows(*map(str, range(500))))
    content = torn.read_bytes()
    torn.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"torn.parquet is not a readable parquet file"):
        list(read_rows(torn))
    torn.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    with pytest.raises(InputError, match=r"torn\.parquet"):
        list(read_rows(torn))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*a.json as JSON"):
        read_json(tmp_path / "a.json")


def test_atomic_file_passes_on_the_errors_of_its_body(tmp_path):
    with pytest.raises(OSError, match="other"), atomic_file(tmp_path / "a"):
        raise OSError(errno.EIO, "other")
    assert not names(tmp_path)


def test_parts_are_merged_in_order_and_removed(tmp_path):
    path = fraction_path(tmp_path, "train", 2)
    parts = FractionParts(path, SCHEMA, MADE, part_len=1, num_rows=3)
    assert parts.pending() == [0, 1, 2]
    parts.write(1, rows("b"))
    parts.write(0, rows("a"))
    (parts.folder / ".part-000002.parquet.9-aa.tmp").touch()
    assert FractionParts(path, SCHEMA, MADE, 1, 3).pending() == [2] and not parts.merge()
    parts.write(2, rows("c"))
    assert parts.merge() and path == tmp_path / "train-00002.parquet"
    assert [row["prompt_id"] for row in read_rows(path)] == ["a", "b", "c"]
    assert [name for name in names(tmp_path) if name.endswith((".parquet", ".tmp"))] == ["train-00002.parquet"]


def test_parts_of_another_model_are_not_taken(tmp_path):
    path = fraction_path(tmp_path, "train", 0)
    FractionParts(path, SCHEMA, MADE, 1, 2).write(0, rows("a"))
    other = FractionParts(path, SCHEMA, Provenance("generated", model="n", num_prompts=3), 1, 2)
    assert other.pending() == [0, 1]
