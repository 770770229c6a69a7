"""Any JSON under the columns that the readers know: a row, or an InputError that can be printed and stored."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core.errors import InputError
from spin.alignment.data.formats import FORMATS, to_conversations
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.reformat import ReformatConfig, reformat

TEXT = st.one_of(
    st.text(max_size=6), st.sampled_from(["\ud83d", "a\0b", "user", "assistant", "system", "\n\nHuman: q", ""])
)
NUMBERS = st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.booleans())
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), NUMBERS, TEXT),
        "content": st.one_of(TEXT, NUMBERS, st.none(), st.lists(TEXT, max_size=2)),
        "from": st.one_of(st.sampled_from(["human", "gpt"]), TEXT, NUMBERS),
        "value": st.one_of(TEXT, NUMBERS, st.none()),
        "name": st.one_of(TEXT, st.none()),
    },
)
ANYTHING = st.recursive(
    st.one_of(TEXT, NUMBERS, st.none(), TURN),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
CONVERSATION = st.lists(TURN, max_size=4)
SPEECH = st.one_of(ANYTHING, CONVERSATION, TEXT)
COLUMNS = sorted(
    {column for columns in FORMATS for column in columns} | {"id", "prompt_id", "system", "input", "history"}
)
PAIR_COLUMNS = (
    *("prompt", "prompt_id", "sample_index", "rejected_token_ids", "rejected_finish_reason", "chosen_weights"),
    *("chosen_x", "rejected_x", "chosen_probs", "score_chosen", "score_rejected", "chosen_weight", "tools"),
)


def others(columns):
    extra = ("id", "prompt_id", "system", "input", "history", "prompt")
    return {name: SPEECH for name in extra if name not in columns}


RECORD = st.one_of(
    *(st.fixed_dictionaries(dict.fromkeys(columns, SPEECH), optional=others(columns)) for columns in FORMATS),
    st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXT), SPEECH, max_size=4),
)
ANSWER = st.one_of(
    SPEECH, st.just([{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ud83d"}]), TEXT
)
PAIR = st.fixed_dictionaries(
    {"chosen": ANSWER, "rejected": ANSWER},
    optional=dict.fromkeys(PAIR_COLUMNS, st.one_of(TEXT, NUMBERS, st.none(), st.lists(NUMBERS, max_size=2))),
)


def check(error: InputError) -> None:
    assert str(error).encode() and str(error)


@settings(max_examples=200, deadline=None)
@given(record=RECORD, required=st.booleans(), turns=st.sampled_from(["last", "all"]))
def test_any_record_is_a_conversation_or_refused(record, required, turns):
    try:
        found = to_conversations(record, "row", turns, ground_truth_required=required)
    except InputError as error:
        check(error)
        return
    for conversation in found:
        conversation.prompt_id.encode()
        assert all(turn["content"].encode() is not None for turn in conversation.messages)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(PAIR, min_size=1, max_size=3))
def test_any_pairs_are_loaded_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        load_preferences(path, "train")
    except InputError as error:
        check(error)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(RECORD, min_size=1, max_size=4))
def test_invalid_rows_are_skipped_whatever_they_contain(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fuzz")
    good = {"id": "good", "prompt": "2+3?", "response": "5"}
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [good, *rows])))
    try:
        reformat(ReformatConfig(data=str(folder / "a.jsonl"), output_dir=str(folder / "out"), skip_invalid=True))
    except InputError as error:  # two rows may share an id
        assert "belongs to several different prompts" in str(error)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            '{"id": "\\ud83d", "messages": [{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}',
            "in 'id'",
        ),
        (
            '{"conversations": [{"from":"user\\ud83d","value":"q"},{"from":"gpt","value":"a"}]}',
            r"unknown speaker 'user\ud83d'",
        ),
        ('{"\\ud83d": 1}', r"has the columns \ud83d: rename them"),
        ('{"prompt": "q", "response": NaN}', "'response' is float, not a list of turns"),
        ('{"prompt": Infinity, "response": "a"}', "'prompt' is float"),
    ],
)
def test_what_cannot_be_stored_is_named_and_skipped(tmp_path, capsys, rows, sentence):
    path = tmp_path / "a.jsonl"
    path.write_text(rows + "\n" + '{"prompt": "a\\u0000b", "response": "c", "note": "\\ud83d"}\n')
    settings = {"data": str(path), "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError) as error:
        reformat(ReformatConfig(**settings))
    assert "a.jsonl row 0" in str(error.value) and sentence in str(error.value)
    reformat(ReformatConfig(**settings, skip_invalid=True))
    out = capsys.readouterr().out
    assert "1 invalid rows skipped" in out and sentence in out
