"""Columns and keys beside the text: used, carried to scorers, ignored, or refused by name. Worked by hand."""

from __future__ import annotations

import datetime
import decimal
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core import remarks
from spin.alignment.core.errors import InputError
from spin.alignment.data import columns as columns_module
from spin.alignment.data.columns import SYSTEM_COLUMNS, RowNotes
from spin.alignment.data.formats import FORMATS, to_conversations
from spin.alignment.data.refused_columns import REFUSALS
from spin.alignment.data.rows import PROMPT_SCHEMA, load_prompts, prompts_hash, to_prompt_rows

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt and chosen": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt and response": {"prompt": "q", "response": "a"},
    "question and answer": {"question": "q", "answer": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "real": {"real": [USER, ANSWER], "generated": [USER, {**ANSWER, "content": "b"}]},
}
each_form = pytest.mark.parametrize("record", FORMS.values(), ids=FORMS.keys())


def nested(depth: int) -> list:
    """Return lists within lists, as a damaged or hostile file may have them."""
    found: list = []
    for _ in range(depth):
        found = [{"x": found}]
    return found


def read(record: dict, **settings) -> tuple:
    notes = RowNotes()
    (conversation,) = to_conversations(record, "a.jsonl row 7", notes=notes, **settings)
    return conversation, notes


@each_form
@pytest.mark.parametrize("name", SYSTEM_COLUMNS)
def test_a_system_column_becomes_the_system_turn(record, name):
    conversation, notes = read(record | {name: "Be terse."})
    assert conversation.messages == [{"role": "system", "content": "Be terse."}, USER, ANSWER]
    assert conversation.prompt_id != read(record)[0].prompt_id
    assert (notes.carried, notes.ignored) == (set(), set())
    for empty in (None, "", " \n", float("nan")):  # pandas writes NaN
        assert read(record | {name: empty})[0].messages == [USER, ANSWER]


def test_two_different_system_prompts_are_refused():
    own = {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    assert read(own | {"system": "Be brief."})[0].messages == own["messages"]
    with pytest.raises(InputError, match=r"row 7 has different system prompts \(system and a system turn\): keep one"):
        read(own | {"system": "Be long."})
    with pytest.raises(InputError, match=r"\(system and system_prompt\)"):
        read({**FORMS["messages"], "system": "a", "system_prompt": "b"})
    with pytest.raises(InputError, match="'system' is list, not text"):
        read({**FORMS["messages"], "system": ["a"]})


# Column, a value that matters, and values that mean nothing.
REFUSED = {
    "images": (["a.png"], [None, [], [None]]),
    "image": ({"bytes": b"x", "path": None}, [None, {"bytes": None, "path": None}]),
    "video_url": ("a.mp4", ["", None]),
    "num_images": (2, [0, None]),
    "audios": (["a.wav"], [[]]),
    "pixel_values": ([[0.1]], [None]),
    "weight": (0.5, [None, 1, 1.0]),
    "sample_weight": (0, [1]),
    "token_weights": ([1.0, 0.5], [[1.0, 1.0], []]),
    "train": (False, [True, None]),
    "loss": (0, [1]),
    "loss_mask": ([0, 1], [None, []]),
    "mask": ("User", [None, ""]),
    "attention_mask": ([1, 1], [None]),
    "label": (3, [None, ""]),
    "labels": ([1, 2], [None, []]),
    "is_correct": (False, [True, None]),
    "input_ids": ([1, 2], [None]),
    "enable_thinking": (True, [None]),
    "reasoning_effort": ("high", [None]),
    "documents": ([{"text": "x"}], [[]]),
    "chat_template": ("{{ messages }}", [None]),
    "thoughts": ("hm", [""]),
    "tool_calls": ([{"name": "f"}], [[]]),
    "available_tools": ("[]x", [None]),
    "is_chosen": ("False", ["True", 1]),
    "accepted": (0, [True, "yes"]),
    "attachments": (["a.pdf"], [None, []]),
    "multi_modal_data": ({"image": ["a.png"]}, [{"image": []}]),
    "is_training": (False, [True]),
    "rationale": ("hm", ["", float("nan")]),
    "system_instruction": ("Be terse.", ["", None]),
    # As other languages write them.
    "pixelValues": ([[0.1]], [None]),
    "systemPrompt": ("Be terse.", [" "]),
    "enableThinking": (True, [None]),
    "toolCalls": ([{"name": "f"}], [[]]),
    "inputIds": ([1, 2], [None]),
}


@each_form
@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_would_change_the_training_is_refused_by_name(record, name):
    value, harmless = REFUSED[name]
    with pytest.raises(InputError, match=rf"^a\.jsonl row 7 has '{name}'.*(remove|rename|write)"):
        read(record | {name: value})
    for nothing in harmless:
        assert read(record | {name: nothing})[0].messages == [USER, ANSWER]


@pytest.mark.parametrize("name", ["context", "options", "choices", "history", "documents", "instruction", "input"])
def test_a_part_of_the_prompt_beside_texts_is_refused(name):
    with pytest.raises(InputError, match=rf"has '{name}', which"):
        read({**FORMS["question and answer"], name: ["x", "y"]})
    assert read({**FORMS["question and answer"], name: []})[0].messages == [USER, ANSWER]


@pytest.mark.parametrize("as_text", [False, True])
def test_instructions_for_a_scorer_are_carried_and_others_refused(as_text):
    checked = [{"kind": "no_commas"}, {"kind": "lines", "arguments": {"count": 2}}]
    row = FORMS["prompt and response"] | {"instructions": json.dumps(checked) if as_text else checked}
    (found,) = to_conversations(row, "row")
    assert found.extra_columns == {"instructions": row["instructions"]}
    for other in ("Answer briefly.", ["Answer briefly."], [{"text": "Answer briefly."}], "[1"):
        with pytest.raises(InputError, match="row has 'instructions', which would change the prompt"):
            to_conversations(row | {"instructions": json.dumps(other) if as_text else other}, "row")


def test_raw_material_beside_whole_turns_is_carried():
    conversation, notes = read({**FORMS["messages"], "instruction": "q", "options": ["x"]})
    assert conversation.messages == [USER, ANSWER] and notes.carried == {"instruction", "options"}


@each_form
def test_other_columns_are_carried_and_copies_ignored(record):
    day = datetime.date(2026, 11, 28)
    more = {
        "source": "web",
        "difficulty": 3,
        "day": day,
        "price": decimal.Decimal("2.50"),
        "time": datetime.time(12, 30),
        "hash": b"x",
        "text": "q a",
        "category": None,
        "label_name": "math",
    }
    conversation, notes = read(record | more)
    assert conversation.messages == [USER, ANSWER]
    assert conversation.extra_columns == {
        "source": "web", "difficulty": 3, "day": day, "price": decimal.Decimal("2.50"), "time": datetime.time(12, 30),
        "category": None, "label_name": "math",
    }  # fmt: skip
    assert (notes.carried, notes.ignored) == ({*conversation.extra_columns}, {"hash", "text"})
    row = conversation.row()
    stored = json.loads(row["extra_columns"])
    assert (stored["day"], stored["price"], stored["time"]) == ("2026-11-28", "2.50", "12:30:00")
    # Prompt rows are read again as they were written.
    (again,) = to_conversations(row, "row")
    assert again.row() == row


def test_a_column_nested_too_deep_is_ignored_and_reported():
    conversation, notes = read({**FORMS["messages"], "meta": nested(5000), "images": [[[[None]]]]})
    assert conversation.extra_columns == {} and notes.ignored == {"meta"}


def test_rows_without_anything_new_are_as_before(tmp_path):
    for record in FORMS.values():
        assert read(record)[0].row().keys() == {"prompt_id", "chosen"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(FORMS["messages"]))
    prompts = load_prompts(str(path), "train")
    assert prompts.features.arrow_schema.remove_metadata() == PROMPT_SCHEMA
    assert prompts[0]["prompt_id"] == "fa15f8049703d41b" and prompts_hash(prompts) == "2652fbb140649559"


def test_what_is_carried_or_ignored_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remarks, "_said", set())
    path = tmp_path / "a.jsonl"
    turns = [{**USER, "timestamp": 5}, ANSWER]
    path.write_text(
        "".join(json.dumps({"messages": turns, "id": name, "source": name, "text": name}) + "\n" for name in "ab")
    )
    for _ in range(2):
        load_prompts(str(path), "train")
    assert capsys.readouterr().err == (
        f"{path}: columns passed to scorers only: source; ignored columns: text; ignored keys of turns: timestamp\n"
    )


def test_columns_of_the_source_reach_the_rows_in_memory_and_on_disk(tmp_path):
    from datasets import Dataset

    records = [
        {"prompt": "q1", "response": "a", "tools": [{"name": "f", "x": None}], "source": "web"},
        {"prompt": "q2", "response": "a", "chat_template_kwargs": {"enable_thinking": False}, "tools": "[]"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    first, second = load_prompts(str(path), "train")
    assert first["tools"] == '[{"name": "f"}]' and first["chat_template_kwargs"] is None
    assert second["chat_template_kwargs"] == '{"enable_thinking": false}' and second["tools"] is None
    assert json.loads(first["extra_columns"]) == {"source": "web"} and second["extra_columns"] is None
    rows = to_prompt_rows(Dataset.from_list([records[0]]), "train_dataset")
    assert rows == [{name: value for name, value in first.items() if value is not None}]
    assert prompts_hash(rows) == prompts_hash([first]) != prompts_hash([{**rows[0], "tools": "[]"}])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tools": "nonsense"}, "'tools' is not JSON"),
        ({"tools": [1]}, "'tools' is not a list of objects"),
        ({"tools": [{"name": "\ud83d"}]}, "half a character"),
        ({"tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "has both tools and functions"),
        ({"chat_template_kwargs": [{"a": 1}, {"b": 1}]}, "'chat_template_kwargs' is not one object"),
        ({"chat_template_kwargs": "[1]"}, "'chat_template_kwargs' is not a list of objects"),
        ({"extra_columns": "[]"}, "'extra_columns' is not the JSON text of an object"),
        ({"extra_columns": "{"}, "'extra_columns' is not JSON text"),
        ({"reasoning": ["x"]}, "'reasoning' is list, not text"),
        ({"id": "\ud83d"}, "half a character"),
        ({"tools": nested(2000)}, "'tools' cannot be written as JSON|is not a list of objects"),
        ({"extra_columns": "[" * 100_000}, "'extra_columns' is not JSON text"),
        ({"reasoning": "x", "thinking": "y"}, "has different thoughts in 'thinking'"),
    ],
)
def test_bad_values_are_named(record, message):
    with pytest.raises(InputError, match=message):
        read(FORMS["messages"] | record)


@each_form
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_thoughts_in_a_column_of_their_own_belong_to_the_answer(record, name):
    assert read(record | {name: "hm"})[0].messages == [USER, {**ANSWER, "reasoning_content": "hm"}]


def test_prompts_that_differ_in_what_the_template_reads_have_different_ids():
    names = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    conversations = [read(FORMS["messages"] | more)[0] for more in ({}, *({name: names[name]} for name in names))]
    assert len({item.prompt_id for item in conversations}) == len({item.hash for item in conversations}) == 3


def test_functions_become_tools():
    conversation, _ = read(FORMS["messages"] | {"functions": [{"name": "f", "parameters": {}}]})
    assert json.loads(conversation.tools) == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@each_form
def test_a_response_with_the_label_false_is_never_ground_truth(record, tmp_path, capsys):
    notes = RowNotes()
    for value in (False, "false", " False"):
        assert to_conversations(record | {"label": value}, "row", notes=notes) == []
    assert to_conversations(record | {"kto_tag": False}, "row", notes=notes, ground_truth_required=False) == []
    assert notes.label_false == 4
    assert read(record | {"label": True})[0].messages == [USER, ANSWER]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record | {"label": False}))
    with pytest.raises(InputError, match="only rows with label false"):
        load_prompts(str(path), "train")
    path.write_text("\n".join(map(json.dumps, ({"prompt": "p", "response": "r"}, record | {"label": False}))))
    assert len(load_prompts(str(path), "train")) == 1
    assert "skipped, because a response with label false is no ground truth: 1" in capsys.readouterr().err


_NAMES = st.sampled_from(
    [*sorted({name for kind in REFUSALS for name in kind.names}), *REFUSED, "source", "category", "meta"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    columns=st.dictionaries(_NAMES | st.text(min_size=1, max_size=8), _VALUES, max_size=3),
)
def test_any_other_column_is_carried_ignored_used_or_refused(form, columns):
    """Never an exception of another kind, and never another text than the row's own."""
    record = columns | FORMS[form]
    notes = RowNotes()
    try:
        found = to_conversations(record, "row", notes=notes)
    except InputError as error:
        assert str(error).startswith("row")
        return
    for conversation in found:
        texts = [turn["content"] for turn in conversation.messages if turn["role"] != "system"]
        assert texts[-1] == "a" and texts[-2].startswith("q")
        others = columns.keys() - FORMS[form].keys() - notes.ignored
        carried = {name for name in others if name in conversation.extra_columns}
        # Whatever is not carried was read by a reader or says nothing.
        used = {
            "system",
            "system_prompt",
            "system_message",
            "reasoning",
            "reasoning_content",
            "thinking",
            "tools",
            "functions",
        }
        used |= {
            "chat_template_kwargs",
            "extra_columns",
            "label",
            "kto_tag",
            "prompt_id",
            "id",
            "input",
            "context",
            "history",
        }
        for name in others - carried - used:
            assert any(kind.concerns(name) for kind in REFUSALS) or name in columns_module.COPIES | columns_module.OWN
        pa.Table.from_pylist([conversation.row()])


def test_every_form_is_covered_by_these_tests():
    assert {("prompt", "completion")} == {
        form for form in FORMATS if not any(set(form) <= record.keys() for record in FORMS.values())
    }
