"""Parquet files of one split whose columns differ in type: the same pairs, or the file and the column by name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data.preferences import load_preferences, mix_preferences
from spin.alignment.data.rows import MESSAGES, PREFERENCE_SCHEMA

USER, CHOSEN, REJECTED = ({"role": role, "content": text} for role, text in
                          (("user", "2+3?"), ("assistant", "5"), ("assistant", "6")))  # fmt: skip
TURN = [("role", pa.string()), ("content", pa.string())]
OWN = {"prompt_id": pa.string(), "sample_index": pa.int32(), "chosen": MESSAGES, "rejected": MESSAGES}


def row(prompt_id: object, **more: object) -> dict:
    return {"prompt_id": prompt_id, "sample_index": 0, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], **more}


def write(folder: Path, number: int, content: dict, name: str = "train_prefs", **types: pa.DataType) -> str:
    folder.mkdir(exist_ok=True)
    schema = pa.schema([(column, types.get(column, OWN.get(column))) for column in content])
    pq.write_table(pa.Table.from_pylist([content], schema), folder / f"{name}-{number:05d}-of-00002.parquet")
    return str(folder)


def turns(*fields: tuple[str, pa.DataType], of=pa.list_) -> pa.DataType:
    return of(pa.struct([pa.field(*field) for field in fields]))


WORDS = pa.dictionary(pa.int32(), pa.string())
SAME = {
    "polars": {
        "prompt_id": pa.large_string(),
        "chosen": turns(("role", pa.large_string()), ("content", pa.large_string()), of=pa.large_list),
    },
    "64 bits": {"sample_index": pa.int64(), "rejected_token_ids": pa.large_list(pa.int64())},
    "unsigned": {"sample_index": pa.uint8(), "rejected_token_ids": pa.list_(pa.uint16())},
    "dictionaries": {
        "prompt_id": WORDS,
        "rejected_finish_reason": WORDS,
        "rejected": turns(("role", WORDS), ("content", pa.string())),
    },
    "order of fields": {"chosen": turns(*TURN[::-1]), "rejected": turns(*TURN[::-1])},
    "not nullable": {"chosen": turns(("role", pa.string(), False), ("content", pa.string(), False))},
    "fixed size": {"chosen": pa.list_(pa.struct(TURN), 2)},
    "floats of pandas": {"sample_index": pa.float64(), "rejected_token_ids": pa.list_(pa.float64())},
}  # fmt: skip


@pytest.mark.parametrize("types", SAME.values(), ids=SAME.keys())
def test_pairs_are_the_same_whatever_wrote_their_file(tmp_path, types):
    more = {"rejected_token_ids": [7, 8], "rejected_finish_reason": "stop"}
    own = {"rejected_token_ids": pa.list_(pa.int32()), "rejected_finish_reason": pa.string()}
    write(tmp_path, 0, row("a", **more), **own)
    folder = write(tmp_path, 1, row("b", **more), **{**own, **types})
    pairs = load_preferences(folder, "train")
    assert pairs.to_list() == [row("a", **more), row("b", **more)]
    assert pairs.with_format("arrow")[:].schema.remove_metadata() == PREFERENCE_SCHEMA


def test_numbers_as_ids_are_texts(tmp_path):
    write(tmp_path, 0, row("a"))
    folder = write(tmp_path, 1, row(7), prompt_id=pa.int64())
    assert load_preferences(folder, "train")["prompt_id"] == ["a", "7"]
    alone = write(tmp_path / "floats", 0, row(7.0), prompt_id=pa.float64())
    (tmp_path / "floats" / "train_prefs-00000-of-00002.parquet").rename(tmp_path / "floats" / "train.parquet")
    assert load_preferences(alone, "train")["prompt_id"] == ["7"]


def test_fields_and_columns_of_one_file_are_null_in_the_other(tmp_path):
    write(tmp_path, 0, row("a", note=1, chosen_score=1), note=pa.int32(), chosen_score=pa.int64())
    more = {**CHOSEN, "reasoning_content": "2, 3"}
    wide = turns(("reasoning_content", pa.large_string()), *TURN)
    pair = row("b", chosen=[USER, more], chosen_score=0.5)
    folder = write(tmp_path, 1, pair, chosen_score=pa.float32(), chosen=wide, rejected=wide)
    pairs = load_preferences(folder, "train").to_list()
    assert pairs[1]["chosen"] == [{**USER, "reasoning_content": None}, more] and pairs[1]["note"] is None
    assert pairs[0]["chosen"][1] == {**CHOSEN, "reasoning_content": None}
    assert [pair["chosen_score"] for pair in pairs] == [1.0, 0.5]


LOSSY = {
    "large ids": ({"rejected_token_ids": [2**40]}, {"rejected_token_ids": pa.list_(pa.int64())}, "'rejected_token_ids'"),
    "half a sample": ({"sample_index": 0.5}, {"sample_index": pa.float64()}, r"'sample_index' \(double\) cannot be read as"),
    "half an id": ({"prompt_id": 0.5}, {"prompt_id": pa.float64()}, r"'prompt_id' \(double\)"),
    "a truth value as id": ({"prompt_id": True}, {"prompt_id": pa.bool_()}, "an id is a text or a whole number"),
    "text as sample": ({"sample_index": "x"}, {"sample_index": pa.string()}, "'sample_index'"),
    "no id": ({"prompt_id": None}, {}, "row 0 has no prompt_id"),
    "no sample": ({"sample_index": None}, {}, "row 0 has no sample_index"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "types", "sentence"), LOSSY.values(), ids=LOSSY.keys())
def test_what_would_be_lost_is_named(tmp_path, changes, types, sentence):
    write(tmp_path, 0, row("a"))
    folder = write(tmp_path, 1, {**row("b"), **changes}, **types)
    with pytest.raises(InputError, match=rf"train_prefs-00001-of-00002.parquet.*{sentence}"):
        load_preferences(folder, "train")


def test_columns_that_cannot_be_one_are_named(tmp_path):
    write(tmp_path, 0, row("a", note="x"), note=pa.string())
    folder = write(tmp_path, 1, row("b", note=[1]), note=pa.list_(pa.int64()))
    with pytest.raises(
        InputError, match=r"'note' of .*00001-of-00002.parquet is list<.*>, but string elsewhere: give it one type"
    ):
        load_preferences(folder, "train")


def test_data_sets_of_different_writers_are_mixed(tmp_path):
    large = SAME["polars"]
    mixer = {}
    for name, types in (("a", {}), ("b", large)):
        write(tmp_path / name, 0, row(name, chosen_score=1), chosen_score=pa.int8() if types else pa.float64(), **types)
        mixer[write(tmp_path / name, 1, row(name + "1"))] = 1
    mixed = mix_preferences(mixer, ["train_prefs"], seed=0)["train"]
    assert sorted(mixed["prompt_id"]) == ["a", "a1", "b", "b1"] and len(set(mixed["source"])) == 2
