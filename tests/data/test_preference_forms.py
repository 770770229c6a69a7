"""Preference rows of other tools: prompt columns, tool calls, unpaired responses, label and weight columns. Worked by hand."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core import remarks
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.preference_forms import check_pair, converted_table
from spin.alignment.data.preferences import load_preferences, mix_preferences, to_preferences
from spin.alignment.data.rows import PREFERENCE_SCHEMA, Features

USER, CHOSEN, REJECTED = ({"role": role, "content": text} for role, text in
                          (("user", "q"), ("assistant", "a"), ("assistant", "b")))  # fmt: skip
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": 1}'}}
SIDES = {"chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(remarks, "_said", set())


def load(tmp_path, *rows: dict) -> Dataset:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_preferences(str(path), "train")


PROMPTS = {
    "alpaca": ({"instruction": "q", "input": "", **SIDES}, [USER]),
    "alpaca input": ({"instruction": "q", "input": "i", **SIDES}, [{"role": "user", "content": "q\n\ni"}]),
    "orca": ({"system": "s", "question": "q", **SIDES}, [SYSTEM, USER]),
    "pirate": ({"system": "s", "prompt": "q", **SIDES}, [SYSTEM, USER]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [USER],
    ),
    "messages": ({"messages": [SYSTEM, USER], **SIDES}, [SYSTEM, USER]),
    "transcript": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, [USER]),
    "long transcript": (
        {side: f"\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant: {text}" for side, text in SIDES.items()},
        [USER, CHOSEN, USER],
    ),
    "original": (
        {"system_prompt": "s", "real": [USER, CHOSEN], "generated": [USER, REJECTED]},
        [SYSTEM, USER],
    ),
    "developer": (
        {"chosen": [{**SYSTEM, "role": "developer"}, USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]},
        [SYSTEM, USER],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), PROMPTS.values(), ids=PROMPTS.keys())
def test_the_prompt_is_found_where_it_is(tmp_path, row, prompt):
    (pair,) = load(tmp_path, row)
    assert (pair["chosen"], pair["rejected"]) == ([*prompt, CHOSEN], [*prompt, REJECTED])
    (same,) = to_preferences(Dataset.from_list([row]), "train_dataset")
    assert same == pair


def test_a_text_without_any_prompt_is_named(tmp_path):
    with pytest.raises(InputError, match=r"row 0 has 'chosen' as text without 'prompt': add that column"):
        load(tmp_path, SIDES)


def test_a_tool_call_makes_two_responses_differ(tmp_path):
    said = [{"role": "assistant", "content": "ok", "tool_calls": calls} for calls in ([CALL], [])]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (pair,) = load(tmp_path, {"prompt": "q", "chosen": said[:1], "rejected": said[1:], "tools": tools})
    assert json.loads(pair["chosen"][-1]["tool_calls"]) == [CALL]
    assert pair["rejected"][-1]["tool_calls"] is None and json.loads(pair["tools"]) == tools
    plain = {"prompt": "q", **SIDES}
    (one,) = load(tmp_path, plain)
    (other,) = load(tmp_path, plain | {"tools": tools})
    assert one["prompt_id"] != other["prompt_id"]


def test_files_with_and_without_optional_fields_mix(tmp_path):
    turn = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    row = {"prompt_id": "x", "sample_index": 0, "chosen": [USER, turn], "rejected": [USER, REJECTED], "tools": "[]"}
    features = Features()
    features.add(row)
    for name, schema, made in (
        ("own", features.extend(PREFERENCE_SCHEMA), row),
        ("plain", PREFERENCE_SCHEMA, {**row, "chosen": [USER, CHOSEN]}),
    ):
        with ParquetSink(
            tmp_path / name / "train_prefs-00000-of-00001.parquet", schema, Provenance("preferences")
        ) as sink:
            sink.write([made])
    own = load_preferences(tmp_path / "own", "train")
    assert own[0]["chosen"][-1] == {**turn, "tool_calls": None} or own[0]["chosen"][-1] == turn
    mixed = mix_preferences({str(tmp_path / name): 1 for name in ("own", "plain")}, ["train"], seed=0)["train"]
    assert sorted(str(turns[-1].get("reasoning_content")) for turns in mixed["chosen"]) == ["None", "hm"]


def test_unpaired_responses_are_paired_by_prompt(tmp_path, capsys):
    rows = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "b", "label": False},
        {"prompt": "q", "completion": "c", "label": False},
        {"prompt": [SYSTEM, USER], "completion": [CHOSEN], "label": True, "source": "web"},
        {"prompt": "other", "completion": "b", "label": False},
    ]
    pairs = load(tmp_path, *rows)
    assert [(pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]) for pair in pairs] == [
        ("a", "b"),
        ("a", "c"),
    ]
    assert pairs["sample_index"] == [0, 1] and len(set(pairs["prompt_id"])) == 1
    assert "2 of 3 prompts have only good or only bad responses and give no pair" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no prompt with both a good and a bad one \(the first is .*row 0\)"):
        load(tmp_path, rows[0], rows[4])
    with pytest.raises(InputError, match="has 'label' 3, which is neither true nor false"):
        load(tmp_path, {**rows[0], "label": 3})


REFUSED = {
    "chosen_weight": {"chosen_weight": [0.5, 1.0]},  # with both, they are TIS-DPO's
    "chosen_advantages": {"chosen_advantages": [0.1], "rejected_advantages": [0.2]},
    "chosen_value": {"chosen_value": 0.5},
    "chosen_input_ids": {"chosen_input_ids": [1, 2]},
    "rejected_attention_mask": {"rejected_attention_mask": [1]},
    "rejected_score": {"chosen_score": 1.0, "rejected_score": "bad"},
    "chosen_reasoning": {"chosen_reasoning": "hm"},
    "weight": {"weight": 0.3},
    "label": {"label": True},
    "reasoning": {"reasoning": "hm"},
    "images": {"images": ["a.png"]},
    "loss_mask": {"loss_mask": [1, 0]},
    "context": {"context": "x"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_label_and_weight_columns_of_other_tools_are_refused_by_name(tmp_path, name):
    if name == "rejected_score":
        name = "chosen_score"  # the one of the two that has a number
    with pytest.raises(InputError, match=f"'{name}'"):
        load(tmp_path, {"prompt": "q", **SIDES, **REFUSED.get(name, REFUSED["rejected_score"])})


def test_numbers_of_both_responses_are_labels_and_texts_are_ignored(tmp_path, capsys):
    more = {"chosen_reward": 1, "rejected_reward": None, "chosen_model": "m", "source": "web", "rating": 3}
    pairs = load(
        tmp_path, {"prompt": "q", **SIDES, **more}, {"prompt": "p", **SIDES, "chosen_reward": 2.0, "rejected_reward": 1}
    )
    assert pairs["chosen_reward"] == [1.0, 2.0] and pairs["rejected_reward"] == [None, 1.0]
    assert {"chosen_model", "source", "rating", "prompt"}.isdisjoint(pairs.column_names)
    assert capsys.readouterr().err == (
        f"{tmp_path / 'a.jsonl'}: labels, for losses that read them: reward; "
        "ignored columns: chosen_model, rating, source\n"
    )


def test_a_prompt_column_beside_whole_conversations(tmp_path, capsys):
    whole = {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
    assert load(tmp_path, {"prompt": [USER], **whole})[0]["chosen"] == [USER, CHOSEN]
    assert load(tmp_path, {"prompt": "q", **whole})[0]["chosen"] == [USER, CHOSEN]
    assert capsys.readouterr().err == f"{tmp_path / 'a.jsonl'}: ignored columns: prompt\n"
    with pytest.raises(
        InputError, match="'chosen' is a whole conversation, but does not start with the turns in 'prompt'"
    ):
        load(tmp_path, {"prompt": [SYSTEM, USER], **whole})


def test_a_response_of_weight_0_is_refused(tmp_path):
    with pytest.raises(InputError, match="the last turn of 'chosen' has weight 0"):
        load(tmp_path, {"prompt": "q", "chosen": [{**CHOSEN, "weight": 0}], "rejected": "b"})


@pytest.mark.parametrize(("name", "value"), [("images", ["a.png"]), ("sample_weight", 0.5), ("chosen_weight", [0.5])])
def test_rows_in_the_projects_format_are_checked_too(tmp_path, name, value):
    row = {"prompt_id": "x", "sample_index": 0, "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
    rows = Dataset.from_list([{**row, name: None}, {**row, "prompt_id": "y", name: value}])
    with pytest.raises(InputError, match=f"row 1 has '{name}'"):
        to_preferences(rows, "train_dataset")
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=f"row 1 has '{name}'"):
        load_preferences(tmp_path, "train")
    assert len(to_preferences(Dataset.from_list([{**row, name: None, "source": "web"}]), "train_dataset")) == 1


_TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]),
        "content": st.sampled_from(["q", "a", "", None]),
    },
    optional={"tool_calls": st.sampled_from([[CALL], None, "x"]), "weight": st.sampled_from([0, 1, None])},
)
_SIDE = st.sampled_from(["a", "", None, "\n\nHuman: q\n\nAssistant: a", 3]) | st.lists(_TURN, max_size=4) | _TURN
_COLUMNS = st.dictionaries(
    st.sampled_from(
        [
            "prompt",
            "question",
            "system",
            "tools",
            "label",
            "chosen_x",
            "rejected_x",
            "chosen_weights",
            "sample_index",
            "prompt_id",
            "images",
            "chosen_token_ids",
            "rejected_finish_reason",
            "reasoning",
            "source",
            "completion",
            "initial",
        ]
    ),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["q", "", "\ud83d"])
    | st.lists(st.integers(), max_size=2),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.fixed_dictionaries({}, optional={"chosen": _SIDE, "rejected": _SIDE}), _COLUMNS),
        min_size=1,
        max_size=3,
    )
)
def test_any_rows_become_checked_pairs_or_one_sentence(rows):
    records = [(f"row {number}", columns | sides) for number, (sides, columns) in enumerate(rows)]
    try:
        table = converted_table(iter(records), "a.jsonl")
    except InputError as error:
        assert "\n" not in str(error).strip()
        return
    for number, pair in enumerate(table.to_pylist()):
        check_pair(pair["chosen"], pair["rejected"], f"row {number}", pair.get("chosen_token_ids") is not None)
