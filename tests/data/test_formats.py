"""Foreign forms, files and splits, worked by hand."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.data import file_readers
from spin.alignment.data import formats as readers
from spin.alignment.data.foreign_forms import FOREIGN_FORMS
from spin.alignment.data.formats import FORMATS, to_conversations
from spin.alignment.data.source_files import read_records, split_files

USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = [{"role": "user", "content": "Twice?"}, {"role": "assistant", "content": "10"}]
SHAREGPT = [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"}]
RECORDS = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "prompt+response": ({"prompt": "2+3?", "response": "5"}, [USER, ANSWER]),
    "prompt+completion": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "own rows": ({"prompt_id": "a", "chosen": [USER, ANSWER], "rejected": [USER, MORE[1]]}, [USER, ANSWER]),
    "explicit prompt": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [MORE[1]]}, [USER, ANSWER]),
    "ultrafeedback": ({"prompt": "2+3?", "chosen": [USER, ANSWER], "rejected": [USER, MORE[1]]}, [USER, ANSWER]),
    "plain chosen": ({"prompt": "2+3?", "chosen": "5", "rejected": "10"}, [USER, ANSWER]),
    "original": ({"real": [USER, ANSWER], "generated": [USER, MORE[1]]}, [USER, ANSWER]),
    "alpaca": ({"instruction": "2+3?", "input": "", "output": "5"}, [USER, ANSWER]),
    "alpaca input": (
        {"instruction": "Add.", "input": "2+3", "output": "5", "system": "Be brief.", "history": [["2+3?", "5"]]},
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "Add.\n\n2+3"}, ANSWER],
    ),
    "sharegpt": ({"id": "x", "conversations": SHAREGPT}, [USER, ANSWER]),
    "gsm8k": ({"question": "2+3?", "answer": "5"}, [USER, ANSWER]),
    "trailing question": ({"messages": [USER, ANSWER, MORE[0]]}, [USER, ANSWER]),
}


@pytest.mark.parametrize(("record", "messages"), RECORDS.values(), ids=RECORDS.keys())
def test_every_form_becomes_one_conversation(record, messages):
    (conversation,) = to_conversations(record, "row")
    assert conversation.messages == messages
    assert conversation.prompt_id == record.get("prompt_id", record.get("id", readers.prompt_hash(messages[:-1])))


def test_every_form_in_the_registry_is_tested():
    own = FORMATS.keys() - FOREIGN_FORMS.keys()  # the others are in test_foreign_forms.py
    assert {columns for columns in own if any(set(columns) <= set(record) for record, _ in RECORDS.values())} == own


def test_all_turns_are_played_with_numbered_ids():
    conversations = to_conversations({"id": "x", "messages": [USER, ANSWER, *MORE]}, "row", "all")
    assert [(item.prompt_id, item.messages) for item in conversations] == [
        ("x#0", [USER, ANSWER]),
        ("x#1", [USER, ANSWER, *MORE]),
    ]
    # A row with one answer keeps its id.
    assert [item.prompt_id for item in to_conversations({"id": "x", "messages": [USER, ANSWER]}, "row", "all")] == ["x"]


def test_questions_and_answers_of_a_history_are_turns():
    record = {"instruction": "4+5?", "output": "9", "history": [["2+3?", "5"]]}
    assert [turn["content"] for turn in to_conversations(record, "row")[0].messages] == ["2+3?", "5", "4+5?", "9"]
    for history in ([["2+3?"]], [["2+3?", "5", "x"]], ["2+3?", "5"]):
        with pytest.raises(InputError, match=r"'history' must contain \[question, answer\] pairs"):
            to_conversations({**record, "history": history}, "row")


def message(role, content):
    return {"messages": [{"role": role, "content": content}, ANSWER]}


PROMPTS = {
    "text": ({"prompt": "2+3?"}, [USER]),
    "turns": ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
    "later turn": ({"prompt": [USER, ANSWER, MORE[0]]}, [USER, ANSWER, MORE[0]]),
    "null answer": ({"prompt": "2+3?", "response": None}, [USER]),
    "null chosen": ({"prompt": "2+3?", "chosen": None, "rejected": None}, [USER]),
    "messages": ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
    "own rows": ({"prompt_id": "a", "chosen": [USER]}, [USER]),
}


@pytest.mark.parametrize(("record", "messages"), PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_may_stand_alone_where_no_truth_is_required(record, messages):
    (conversation,) = to_conversations(record, "row", ground_truth_required=False)
    assert conversation.messages == readers.prompt_turns(messages) == messages
    assert conversation.prompt_id == record.get("prompt_id", readers.prompt_hash(messages))
    with pytest.raises(InputError, match="row"):
        to_conversations(record, "row")


@pytest.mark.parametrize(("record", "messages"), RECORDS.values(), ids=RECORDS.keys())
def test_a_row_with_truth_is_read_the_same_where_none_is_required(record, messages):
    assert to_conversations(record, "row", ground_truth_required=False) == to_conversations(record, "row")
    assert readers.prompt_turns(messages) == messages[:-1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": ""}, "empty user turn"),
        ({"prompt": []}, "role order"),
        ({"prompt": 5}, "'prompt' is int"),
        ({"prompt": [USER, USER]}, "role order user user"),
        ({"prompt": [SYSTEM]}, "role order system"),
        ({"text": "2+3?"}, "columns text: rename them"),
    ],
)
def test_a_bad_prompt_without_truth_is_named(record, message):
    with pytest.raises(InputError, match=message):
        to_conversations(record, "row", ground_truth_required=False)


BAD = {
    "no known form": ({"text": "a"}, "columns text: rename them to one of"),
    "no columns": ({}, r"\(none\)"),
    "turns no list": ({"messages": "hello"}, "'messages' is str, not a list"),
    "turn without content": ({"messages": [{"role": "user"}]}, "must contain turns with 'role' and 'content'"),
    "no assistant": ({"messages": [USER]}, "no assistant turn"),
    "no turns": ({"messages": []}, "no assistant turn"),
    "null": ({"chosen": None}, "'chosen' is null: complete or remove the row"),
    "order": ({"messages": [USER, USER, ANSWER]}, "role order user user assistant"),
    "system late": ({"messages": [USER, SYSTEM, ANSWER]}, "role order user system assistant"),
    "tool": ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "role order user tool assistant"),
    "role null": (message(None, "x"), "the role 'None': use one of system"),
    "empty question": (message("user", " \n"), r"empty user turn \(turn 0\)"),
    "empty answer": ({"question": "a", "answer": ""}, r"empty assistant turn \(turn 1\)"),
    "content null": (message("user", None), "has null instead of text in turn 0"),
    "content number": ({"question": "a", "answer": 5}, "has int instead of text in turn 1"),
    "content parts": (
        message("user", [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "a.png"}}]),
        r"has a user turn with a part of its content that is not text \(image_url\)",
    ),
    "answer parts": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        r"has an assistant turn with a part of its content that is not text \(image\)",
    ),
    "response null": ({"prompt": "a", "response": None}, "'response' is null: complete or remove the row"),
    "surrogate": ({"question": "a", "answer": "\ud83d"}, "half a character"),
    "alpaca instruction": ({"instruction": None, "input": 3, "output": "x"}, "'input' is int, not text"),
    "alpaca nothing": ({"instruction": None, "output": "x"}, "empty user turn"),
    "alpaca history is no list": ({"instruction": "a", "output": "x", "history": True}, r"\[question, answer\] pairs"),
    "alpaca history": ({"instruction": "a", "output": "x", "history": ["q"]}, r"\[question, answer\] pairs"),
    "sharegpt starts with gpt": ({"conversations": SHAREGPT[::-1] + SHAREGPT}, "role order assistant user user"),
    "sharegpt speaker": ({"conversations": [{"from": "bing", "value": "x"}]}, "unknown speaker 'bing': use one of"),
    "sharegpt turn": ({"conversations": [{"human": "x"}]}, "turns with 'from' and 'value'"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD.keys())
def test_bad_rows_are_named(record, message):
    with pytest.raises(InputError, match=message) as error:
        to_conversations(record, "a.jsonl row 7")
    assert str(error.value).startswith("a.jsonl row 7")


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_json_arrays_stream_in_pieces_of_any_size(tmp_path, chunk):
    path = tmp_path / "a.json"
    rows = [{"question": 'a ] , "{é}', "answer": str(n)} for n in range(5)]
    for indent in (None, 2):
        path.write_text("\n " + json.dumps(rows, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8-sig")
        assert list(file_readers._read_json_array(path, chunk)) == [(f"{path} row {n}", rows[n]) for n in range(5)]
    path.write_text("[]")
    assert list(file_readers._read_json_array(path, chunk)) == []


def test_all_file_kinds_give_the_same_rows(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    for path in tmp_path.iterdir():
        assert [record for _, record in read_records(str(path))] == rows


CONTENTS = {
    "empty.jsonl": (b"", "empty.jsonl contains no rows"),
    "empty.json": (b"[]", "empty.json contains no rows"),
    "line.jsonl": (b'{"a": 1}\n{"a": ', "line.jsonl line 2 is not JSON"),
    "open.json": (b'[{"a": 1}, {"a": 2', "open.json is not JSON at row 1"),
    "unclosed.json": (b'[{"a": 1}', "unclosed.json is not JSON at row 0"),
    "comma.json": (b'[{"a": 1} {"a": 2}]', "neither a comma nor a closing bracket after row 0"),
    "number.jsonl": (b"3", "number.jsonl row 0 is int, not an object"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), "latin.jsonl is not UTF-8 text"),
    "torn.parquet": (b"PAR1 nothing", "torn.parquet is not a readable parquet file"),
    "table.xlsx": (b"a,b", r"unknown file type: give a file that ends in \.parquet, \.jsonl, \.json"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_files_are_named(tmp_path, name):
    content, message = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_records(str(tmp_path / name)))


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        list(read_records("nowhere.jsonl"))
    with pytest.raises(
        InputError, match=r"'no-such/data-set' is neither a local file or folder nor a reachable Hub data set"
    ):
        list(read_records("no-such/data-set"))
    with pytest.raises(InputError, match="no data file"):
        list(read_records(str(tmp_path)))


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.parquet", "test.parquet", "notes.txt"], "train", ["train.parquet"]),
        (["train-00000.parquet", "train-00001.parquet", "train2.json"], "train", ["train-00000.parquet", "train-00001.parquet"]),
        (["train_prefs-00000-of-00001.parquet", "train_prefs.counts.json"], "train", ["train_prefs-00000-of-00001.parquet"]),
        (["train_prefs-00000-of-00001.parquet", "train_prefs.weights.json"], None, ["train_prefs-00000-of-00001.parquet"]),
        (["train_sft-00000-of-00001-0123456789abcdef.parquet"], "train", ["train_sft-00000-of-00001-0123456789abcdef.parquet"]),
        (["data/test-00000-of-00001.parquet", "README.md"], "test", ["data/test-00000-of-00001.parquet"]),
        (["anything.jsonl"], "train", ["anything.jsonl"]),
    ],
)  # fmt: skip
def test_files_of_a_split(tmp_path, files, split, expected):
    (tmp_path / "data").mkdir()
    for name in files:
        (tmp_path / name).touch()
    assert split_files(tmp_path, split) == [tmp_path / name for name in expected]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train.jsonl"], "test", r"no file of the split 'test' \(found train.jsonl\)"),
        (["test.jsonl"], "train", r"no file of the split 'train' \(found test.jsonl\)"),
        (["train_sft.jsonl", "train_gen.jsonl"], "train", r"several splits like 'train' \(train_gen, train_sft\)"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "train", "is missing train-00001-of-00003"),
        (["train.jsonl", "train.parquet"], "train", "'train' as .jsonl and .parquet files: remove one kind"),
        (["train-0-of-1.parquet", "train-0-of-2.parquet", "train-1-of-2.parquet"], "train", "sets of different sizes"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "train", "train.jsonl besides the numbered set train: remove one"),
        (["train.jsonl", "data/train-00000-of-00001.jsonl"], "train", "'train' twice, as train.jsonl and as data/train-0"),
    ],
)  # fmt: skip
def test_unclear_folders_are_refused(tmp_path, files, split, message):
    (tmp_path / "data").mkdir()
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        split_files(tmp_path, split)
