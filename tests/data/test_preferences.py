"""Loading, checking and mixing of prompt rows and preference rows."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.preferences import load_preferences, mix_preferences, split_prompt
from spin.alignment.data.rows import PREFERENCE_SCHEMA, PROMPT_SCHEMA, load_prompts, prompts_hash

USER, CHOSEN, REJECTED = ({"role": role, "content": text} for role, text in
                          (("user", "2+3?"), ("assistant", "5"), ("assistant", "6")))  # fmt: skip


def pair(prompt_id: str, sample_index: int = 0, question: str = "2+3?", rejected: str = "6") -> dict:
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt_id": prompt_id,
        "sample_index": sample_index,
        "chosen": [*prompt, CHOSEN],
        "rejected": [*prompt, {"role": "assistant", "content": rejected}],
        "rejected_token_ids": [7, 8],
        "rejected_finish_reason": "stop",
    }


def write_pairs(path, rows, model=""):
    with ParquetSink(path, PREFERENCE_SCHEMA, Provenance("preferences", model=model)) as sink:
        sink.write(rows)
    return str(path.parent)


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_prompts_keep_ids_and_order(tmp_path):
    with ParquetSink(tmp_path / "train.parquet", PROMPT_SCHEMA, Provenance("prompts")) as sink:
        sink.write([{"prompt_id": name, "chosen": [USER, CHOSEN]} for name in ("b", "a")])
    prompts = load_prompts(str(tmp_path), "train")
    assert prompts["prompt_id"] == ["b", "a"] and prompts[0]["chosen"] == [USER, CHOSEN]
    assert prompts_hash(prompts) == prompts_hash(load_prompts(str(tmp_path / "train.parquet"), "train"))
    assert prompts_hash(prompts) != prompts_hash(prompts.select([1, 0]))


def test_shared_prompt_ids_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": answer} for answer in "xy"])
    with pytest.raises(
        InputError, match=r"a.jsonl row 1 and .*a.jsonl row 0 have the same prompt id .*: run spin/reformat"
    ):
        load_prompts(path, "train")


def test_split_prompt_is_the_common_prefix():
    assert split_prompt([USER, CHOSEN], [USER, REJECTED]) == [USER]
    assert split_prompt([USER, CHOSEN], [USER, CHOSEN]) == [USER]
    assert split_prompt([USER, CHOSEN, USER, CHOSEN], [USER, CHOSEN, USER, REJECTED]) == [USER, CHOSEN, USER]


@pytest.mark.parametrize("split", ["train", "train_prefs"])
def test_own_preferences_load_with_all_columns_from_all_files(tmp_path, split):
    write_pairs(tmp_path / "train_prefs-00000-of-00002.parquet", [pair("a"), pair("a", 1)])
    folder = write_pairs(tmp_path / "train_prefs-00001-of-00002.parquet", [pair("b")])
    pairs = load_preferences(folder, split)
    assert pairs.column_names == PREFERENCE_SCHEMA.names
    assert pairs.to_list() == [pair("a"), pair("a", 1), pair("b")]


def test_the_originals_columns_are_accepted(tmp_path):
    rows = [{"real": [USER, CHOSEN], "generated": [USER, turn]} for turn in (REJECTED, CHOSEN)]
    pairs = load_preferences(write_lines(tmp_path / "train.jsonl", rows), "train")
    assert pairs["chosen"] == [[USER, CHOSEN]] * 2 and pairs["rejected"] == [[USER, REJECTED], [USER, CHOSEN]]
    assert pairs["sample_index"] == [0, 1] and len(set(pairs["prompt_id"])) == 1
    assert "rejected_token_ids" not in pairs.column_names


def test_an_explicit_prompt_column_joins_its_responses(tmp_path):
    rows = [
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": "a", "chosen": "b", "rejected": ""},
    ]
    pairs = load_preferences(write_lines(tmp_path / "a.jsonl", rows), "train")
    assert pairs[0]["chosen"] == [USER, CHOSEN] and pairs[0]["rejected"] == [USER, REJECTED]
    assert pairs[1]["rejected"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]


BAD = {
    "no rejected": ({"chosen": [USER, CHOSEN]}, "row 0 lacks the column 'rejected'"),
    "no chosen": ({"rejected": [USER, CHOSEN]}, "row 0 lacks the column 'chosen'"),
    "other prompt": ({"chosen": [USER, CHOSEN], "rejected": [CHOSEN, USER, REJECTED]}, "do not share a prompt"),
    "ends with user": ({"chosen": [USER, CHOSEN], "rejected": [USER, USER]}, "do not share a prompt"),
    "rejected null": ({"chosen": [USER, CHOSEN], "rejected": [USER, {**REJECTED, "content": None}]}, "is not text"),
    "turn without role": (
        {"chosen": [USER, CHOSEN], "rejected": [{"content": "x"}]},
        "turns with 'role' and 'content'",
    ),
    "token ids": ({**pair("a"), "rejected_token_ids": ["x"]}, "a value of the wrong type"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_bad_pairs_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_preferences(write_lines(tmp_path / "a.jsonl", [row]), "train")


def test_own_files_are_checked_like_foreign_ones(tmp_path):
    broken = {**pair("a"), "rejected": [CHOSEN, REJECTED]}
    folder = write_pairs(tmp_path / "train_prefs-00000-of-00001.parquet", [pair("b"), broken])
    with pytest.raises(InputError, match=r"00001\.parquet row 1: 'chosen' and 'rejected' do not share a prompt"):
        load_preferences(folder, "train")
    write_pairs(tmp_path / "train_prefs-00000-of-00001.parquet", [pair("b", 1), pair("b", 1)])
    with pytest.raises(InputError, match="contains sample 1 of prompt b 2 times"):
        load_preferences(folder, "train")
    write_pairs(tmp_path / "train_prefs-00000-of-00001.parquet", [])
    with pytest.raises(InputError, match="contains no pairs of the split 'train'"):
        load_preferences(folder, "train")


def test_one_set_of_two_runs_is_refused(tmp_path):
    write_pairs(tmp_path / "train_prefs-00000-of-00002.parquet", [pair("a")], "m")
    folder = write_pairs(tmp_path / "train_prefs-00001-of-00002.parquet", [pair("b")], "n")
    with pytest.raises(
        InputError, match=r"and train_prefs-00001-of-00002.parquet come from different runs \(model: 'm' != 'n'"
    ):
        load_preferences(folder, "train")


def test_mixing_keeps_ids_names_sources_and_lets_iterations_overlap(tmp_path):
    for name in ("iter0", "iter1"):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name / "train_prefs-00000-of-00001.parquet", [pair(f"p{n}") for n in range(10)])
    write_pairs(tmp_path / "iter1" / "test_prefs-00000-of-00001.parquet", [pair("t")])
    mixer = {str(tmp_path / "iter0"): 0.5, str(tmp_path / "iter1"): 1.0}
    mixed = mix_preferences(mixer, ["train_prefs"], seed=1)
    assert mixed.keys() == {"train"} and len(mixed["train"]) == 15
    assert mixed["train"].to_list() == mix_preferences(mixer, ["train_prefs"], seed=1)["train"].to_list()
    sources = mixed["train"]["source"]
    assert {path: sources.count(path) for path in mixer} == dict(zip(mixer, (5, 10), strict=True))
    both = mix_preferences({str(tmp_path / "iter1"): 0.2}, ["train_prefs", "test_prefs"], seed=1)
    assert (len(both["train"]), both["test"]["prompt_id"]) == (2, ["t"])


def test_mixing_joins_data_with_and_without_token_ids(tmp_path):
    own = write_pairs(tmp_path / "train_prefs-00000-of-00001.parquet", [pair("a")])
    foreign = write_lines(
        tmp_path / "b.jsonl", [{"prompt_id": "b", "real": [USER, CHOSEN], "generated": [USER, REJECTED]}]
    )
    rows = {row["prompt_id"]: row for row in mix_preferences({own: 1, foreign: 1.0}, ["train"], seed=0)["train"]}
    assert rows["a"]["rejected_token_ids"] == [7, 8] and rows["b"]["rejected_token_ids"] is None


@pytest.mark.parametrize(
    ("mixer", "splits", "message"),
    [
        ({}, ["train"], "dataset_mixer is empty"),
        ({"x": 0}, ["train"], "gives x the fraction 0"),
        ({"x": 1.5}, ["train"], "at most 1"),
        ({"x": True}, ["train"], "fraction True"),
        ({"x": "half"}, ["train"], "fraction half"),
        ({"./nowhere": 1}, ["train"], r"\./nowhere does not exist"),
    ],
)
def test_bad_mixers_are_refused(mixer, splits, message):
    with pytest.raises(InputError, match=message):
        mix_preferences(mixer, splits, seed=0)


def test_a_named_split_that_is_not_there_is_refused(tmp_path):
    folder = write_pairs(tmp_path / "train_prefs-00000-of-00001.parquet", [pair("a")])
    with pytest.raises(InputError, match="no file of the split 'test'"):
        mix_preferences({folder: 1}, ["train", "test"], seed=0)
    with pytest.raises(InputError, match="add a training split"):
        mix_preferences({write_pairs(tmp_path / "test_prefs-00000-of-00001.parquet", [pair("a")]): 1}, ["test"], seed=0)


def test_schemas_are_the_contract():
    assert PREFERENCE_SCHEMA.field("rejected_token_ids").type == pa.list_(pa.int32())
    assert PREFERENCE_SCHEMA.field("sample_index").type == pa.int32()
