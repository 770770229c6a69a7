"""Fractions of a data set, and the journal of one fraction: parts in any order, from any worker, torn or repeated."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core.content_hash import content_hash, seal_path
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import open_parquet, read_rows, read_skipped
from spin.alignment.core.provenance import Provenance, read_provenance
from spin.alignment.data.fractions import fraction_path, fraction_rows, fraction_size, num_fractions
from spin.alignment.data.prompt_store import PromptStore
from spin.alignment.generation import fraction_journal as fractions
from spin.alignment.generation.fraction_journal import FractionJournal, clear_parts
from tests.helpers import flipped

SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("text", pa.string())])
MADE = Provenance("generated", model="m", num_prompts=3)


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


def test_sizes_of_fractions():
    assert [fraction_size(10, number, 4) for number in range(3)] == [4, 4, 2] and fraction_size(10, 0, 0) == 10


def rows(position: int, num_samples: int = 1, text: str = "") -> list[dict]:
    return [
        {"prompt_id": f"p{position}", "sample_index": sample, "text": text or f"{position}.{sample}"}
        for sample in range(num_samples)
    ]


def journal(folder: Path, num_prompts: int, num_samples: int = 1, made: Provenance = MADE) -> FractionJournal:
    folder.mkdir(exist_ok=True)
    opened = FractionJournal(fraction_path(folder, "train", 0), SCHEMA, made, num_prompts, num_samples)
    opened.open()
    return opened


def write(opened: FractionJournal, worker: str, made: dict[int, list[dict]]) -> None:
    """Write the rows of some prompts, by position, as one part."""
    positions = sorted(made)
    table = pa.Table.from_pylist([row for position in positions for row in made[position]], SCHEMA)
    opened.write(worker, positions, table)


def read(folder: Path) -> list[tuple[str, int, str]]:
    return [tuple(row.values()) for row in read_rows(fraction_path(folder, "train", 0))]


def test_parts_of_several_workers_become_one_file_by_position(tmp_path):
    ours, theirs = journal(tmp_path, 4, 2), journal(tmp_path, 4, 2)
    write(ours, "a", {3: rows(3, 2), 0: rows(0, 2)})
    write(theirs, "b", {2: rows(2, 2)})
    assert not ours.is_complete() and not theirs.is_complete()
    write(theirs, "b", {1: rows(1, 2)})
    ours.scan()
    assert ours.is_complete() and not ours.is_merged()
    ours.merge([{"prompt_id": "x", "reason": "too long"}])
    assert read(tmp_path) == [tuple(row.values()) for position in range(4) for row in rows(position, 2)]
    path = fraction_path(tmp_path, "train", 0)
    assert read_provenance(open_parquet(path).schema_arrow, path) == MADE and read_skipped(path)[0]["prompt_id"] == "x"
    assert theirs.is_merged() and not ours.folder.exists()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_prompts=st.integers(1, 700), num_samples=st.integers(1, 3))
def test_the_file_does_not_depend_on_who_wrote_what_and_when(data, num_prompts, num_samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journal")
    order = list(range(num_prompts))
    random.Random(data.draw(st.integers(0, 1000))).shuffle(order)
    while order:
        size = data.draw(st.integers(1, 200))
        part, order = order[:size], order[size:]
        worker = journal(folder, num_prompts, num_samples)  # a new one every time, as after a kill
        write(worker, data.draw(st.sampled_from("abc")) + str(len(order)), {at: rows(at, num_samples) for at in part})
    last = journal(folder, num_prompts, num_samples)
    assert last.is_complete()
    with patch.object(fractions, "_CACHED_BYTES", 2**12):  # tables are read, dropped and read again
        last.merge()
    expected = [tuple(row.values()) for position in range(num_prompts) for row in rows(position, num_samples)]
    assert read(folder) == expected


def test_a_prompt_in_two_parts_is_taken_once(tmp_path):
    first, second = journal(tmp_path, 2), journal(tmp_path, 2)
    write(first, "a", {0: rows(0, text="first")})
    write(second, "b", {0: rows(0, text="second"), 1: rows(1)})
    first.scan()
    first.merge()
    assert read(tmp_path) == [("p0", 0, "first"), ("p1", 0, "1.0")]


def test_a_torn_part_is_set_aside_and_its_prompts_are_made_again(tmp_path):
    writer = journal(tmp_path, 2)
    write(writer, "a", {0: rows(0)})
    write(writer, "a", {1: rows(1)})
    torn = sorted(writer.folder.glob("part-*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    again = journal(tmp_path, 2)
    assert again.finished.tolist() == [False, True] and again.torn == [torn] and not torn.exists()
    write(again, "b", {0: rows(0)})
    again.merge()
    assert len(read(tmp_path)) == 2


def test_parts_of_another_model_are_not_taken(tmp_path):
    write(journal(tmp_path, 2), "a", {0: rows(0)})
    assert not journal(tmp_path, 2, made=Provenance("generated", model="n", num_prompts=3)).finished.any()


def test_a_folder_that_vanished_is_not_made_again(tmp_path):
    writer = journal(tmp_path / "mount", 2)
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"disappeared during generation.* still mounted"):
        write(writer, "a", {0: rows(0)})
    assert not (tmp_path / "mount").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    write(writer, "a", {0: rows(0), 1: rows(1)})
    writer.merge()
    write(writer, "a", {0: rows(0)})  # a worker thought dead, that wakes up after the merge: nothing to add
    assert len(read(tmp_path / "mount")) == 2 and not writer.folder.exists()


def test_parts_folder_goes_with_the_last_fraction_of_the_last_split(tmp_path):
    parts = tmp_path / ".parts"
    (parts / "workers").mkdir(parents=True)
    for name in ("train-00000.lease", "prompts-train-aa.arrow", "prompts-test-aa.arrow", "workers/w.json"):
        (parts / name).touch()
    fraction_path(tmp_path, "train", 0).touch()
    clear_parts(tmp_path, "train", 10, 5)
    assert len(list(parts.iterdir())) == 4  # the second fraction is to come
    fraction_path(tmp_path, "train", 1).touch()
    clear_parts(tmp_path, "train", 10, 5)
    assert sorted(path.name for path in parts.iterdir()) == ["prompts-test-aa.arrow", "workers"]
    fraction_path(tmp_path, "test", 0).touch()
    clear_parts(tmp_path, "test", 3, 0)
    assert not parts.exists()
    shutil.rmtree(tmp_path)


def test_a_part_with_a_flipped_bit_anywhere_is_set_aside_and_its_prompts_generated_again(tmp_path):
    """Also one with a good footer and a damaged body, and one whose positions or provenance are damaged."""
    made = journal(tmp_path, 3)
    made.open()
    write(made, "w", {0: rows(0), 2: rows(2)})
    (path,) = made.folder.glob("part-*.parquet")
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), len(whole) // 5):
        path.write_bytes(flipped(whole, place))
        later = journal(tmp_path, 3)
        later.open()
        assert later.torn == [path] and not later.finished.any()
        path.with_suffix(".torn").unlink()
        path.write_bytes(whole)
        seal_path(path).write_text(content_hash(path))
    later = journal(tmp_path, 3)
    later.open()
    assert later.torn == [] and later.finished.tolist() == [True, False, True]


def test_a_part_of_an_earlier_version_is_read_to_its_end(tmp_path):
    made = journal(tmp_path, 3)
    made.open()
    write(made, "w", {0: rows(0, text="x" * 5000)})
    (path,) = made.folder.glob("part-*.parquet")
    seal_path(path).unlink()
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, 8 * (whole.index(b"xxxx") + 100)))
    later = journal(tmp_path, 3)
    later.open()
    assert later.torn == [path] and not later.finished.any()


def test_prompts_are_stored_again_when_a_bit_flips(tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) + "\n" for n in range(4)))
    path = tmp_path / "parts" / "prompts.arrow"
    first = PromptStore.open(path, str(data), "train")
    expected = first.rows(range(4))
    for file in (path, path.with_suffix(".json")):
        whole = file.read_bytes()
        for place in range(0, 8 * len(whole), 8 * len(whole) // 8):
            file.write_bytes(flipped(whole, place))
            again = PromptStore.open(path, str(data), "train")
            assert again.rows(range(4)) == expected
            assert (again.prompts_hash, again.num_rows) == (first.prompts_hash, 4)
            assert capsys.readouterr().err == f"{path} is damaged: written again from the data\n"
    PromptStore.open(path, str(data), "train").remove()
    assert list(path.parent.iterdir()) == []
