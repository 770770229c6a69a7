"""Atomic files and streamed parquet."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file, read_json, remove_leftovers, write_json_atomic
from spin.alignment.core.parquet import ParquetSink, open_parquet, read_rows, read_skipped
from spin.alignment.core.provenance import Provenance, read_provenance
from tests.helpers import run_main

SCHEMA = pa.schema([("prompt_id", pa.string()), ("value", pa.int64())])
MADE = Provenance("generated", model="m", num_prompts=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def rows(*ids: str) -> list[dict]:
    return [{"prompt_id": name, "value": index} for index, name in enumerate(ids)]


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
    monkeypatch.setattr("spin.alignment.core.parquet.ROW_GROUP_BYTES", 2**20)
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


def test_a_full_disk_anywhere_in_a_program_is_one_sentence():
    def main(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "pairs/.train.part")

    code, _, said = run_main(main)
    assert code == 2 and said == (
        "error: no space left on the disk while writing pairs/.train.part: free some and run the same command again\n"
    )


def test_the_same_weights_in_a_folder_of_another_name_are_no_difference():
    mine = Provenance("generated", model="runs/a", weights_hash="w", split="train")
    assert mine.differences(replace(mine, model="/mnt/b")) == []
    assert mine.differences(replace(mine, model="b", weights_hash="v")) == [
        "model: 'runs/a' != 'b'",
        "weights_hash: 'w' != 'v'",
    ]
    unknown = replace(mine, weights_hash="")
    assert unknown.differences(replace(unknown, model="b")) == ["model: 'runs/a' != 'b'"]
