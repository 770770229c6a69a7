"""Turns of other tools: thoughts, tool calls, content parts, weights. Worked by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core.errors import InputError
from spin.alignment.data.formats import to_conversations
from spin.alignment.data.turns import (
    answer_text,
    check_conversation,
    present_fields,
    prompt_hash,
    prompt_turns,
    question,
)

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": 1}'}}
CALLS = json.dumps([CALL])


def read(*turns: dict, **settings) -> list[dict]:
    (conversation,) = to_conversations({"messages": [*turns]}, "a.jsonl row 7", **settings)
    return conversation.messages


def test_a_tool_call_is_kept_with_its_turn():
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
    assert read(USER, turn) == [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS}]
    for content in ({"content": None}, {}):
        assert read(USER, {"role": "assistant", "tool_calls": [CALL], **content})[-1]["content"] == ""
    for nothing in ([], None, "[]", ""):
        assert read(USER, {**ANSWER, "tool_calls": nothing}) == [USER, ANSWER]
    # Parquet fills in the keys of other rows.
    filled = {"type": "function", "function": {**CALL["function"], "x": None}, "id": None}
    assert read(USER, {**turn, "tool_calls": [filled]})[-1]["tool_calls"] == CALLS
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert read(USER, old)[-1] == {"role": "assistant", "content": "", "tool_calls": CALLS}


def test_tool_turns_stand_between_two_answers():
    called = {"role": "assistant", "content": "", "tool_calls": CALLS}
    reply = {"role": "tool", "content": "", "name": "weather", "tool_call_id": "c1"}
    assert read(USER, called, reply, reply, ANSWER) == [USER, called, reply, reply, ANSWER]
    assert read(USER, called, {"role": "function", "content": "5", "name": "f"}, ANSWER)[2]["role"] == "tool"
    # What follows the last answer has none to learn from.
    assert read(USER, called, reply, ANSWER, USER) == read(USER, called, reply, ANSWER)
    assert read(USER, called, reply) == [USER, called]
    for turns in ([USER, reply, ANSWER], [reply, ANSWER], [USER, ANSWER, reply, USER, ANSWER]):
        with pytest.raises(InputError, match="role order"):
            read(*turns)
    prompt = [USER, called, reply]
    (conversation,) = to_conversations({"prompt": prompt}, "row", ground_truth_required=False)
    assert conversation.messages == prompt_turns(conversation.messages) == prompt


def test_sharegpt_calls_and_observations():
    turns = [("human", "q"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "5"), ("gpt", "a")]
    record = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": "[]"}
    (conversation,) = to_conversations(record, "row")
    calls = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
    assert conversation.messages == [
        USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "5"}, ANSWER,
    ]  # fmt: skip
    assert conversation.tools is None
    with pytest.raises(InputError, match="'function_call' is not JSON"):
        to_conversations(
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f("}]}, "row"
        )


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_thoughts_have_one_name(key):
    thinking = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert read(USER, {**ANSWER, key: "hm"}) == [USER, thinking]
    assert read(USER, {**ANSWER, key: "hm"}, USER, ANSWER) == [USER, thinking, USER, ANSWER]
    assert read(USER, {**ANSWER, key: None}) == [USER, ANSWER]


def test_parts_of_text_are_joined_and_parts_of_thought_recognised():
    parts = [{"type": "text", "text": "a", "image": None}, {"text": "b"}]
    assert read(USER, {"role": "assistant", "content": parts})[-1]["content"] == "ab"
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    assert read(USER, {"role": "assistant", "content": parts})[-1] == {**ANSWER, "reasoning_content": "hm"}


def test_what_says_that_a_turn_is_an_ordinary_answer_changes_nothing():
    # A column of this name is a part of the prompt beside texts only, and a turn is a whole one.
    assert read({**USER, "context": "x"}, ANSWER) == [USER, ANSWER]
    for more in (
        {"channel": "final"},
        {"recipient": "all"},
        {"ignore": False},
        {"compute_loss": True},
        {"channel": None},
    ):
        assert read(USER, {**ANSWER, **more}) == [USER, ANSWER]


def test_the_developer_is_the_system():
    assert read({"role": "developer", "content": "s"}, USER, ANSWER)[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_weight", "trainable", "loss_mask"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_an_answer_of_weight_0_is_never_ground_truth(key, no, yes):
    last = {**ANSWER, "content": "z"}
    assert read(USER, {**ANSWER, key: no}, USER, {**last, key: yes}) == [USER, ANSWER, USER, last]
    assert read(USER, {**ANSWER, key: yes}, {**USER, key: no}, {**last, key: no}) == [USER, ANSWER]
    record = {"messages": [USER, {**ANSWER, key: no}, USER, last, USER, ANSWER]}
    assert [len(item.messages) for item in to_conversations(record, "row", "all")] == [4, 6]
    with pytest.raises(InputError, match="no assistant turn to train on, all of them have weight 0"):
        read(USER, {**ANSWER, key: no})
    with pytest.raises(InputError, match=f"has a user turn with '{key}': only assistant turns are trained on"):
        read({**USER, key: yes}, ANSWER)
    with pytest.raises(InputError, match=f"has a turn with '{key}' 0.5: only 0 and 1"):
        read(USER, {**ANSWER, key: 0.5})


BAD = {
    "image part": ([{**USER, "content": [{"type": "image", "image": "a"}]}, ANSWER], r"not text \(image\)"),
    "image in a text part": ([{**USER, "content": [{"text": "x", "image": "a"}]}, ANSWER], r"not text \(image, text\)"),
    "part no object": ([{**USER, "content": ["x"]}, ANSWER], r"not text \(str\)"),
    "images of a turn": ([{**USER, "images": ["a"]}, ANSWER], "has a turn with 'images', which a text model cannot see"),
    "mask of a turn": ([USER, {**ANSWER, "mask": True}], "has a turn with 'mask'"),
    "prefix": ([USER, {**ANSWER, "prefix": True}], "has a turn with 'prefix'"),
    "refusal": ([USER, {**ANSWER, "refusal": "no"}], "has a turn with 'refusal'"),
    "tools of a turn": ([{"role": "system", "content": "s", "tools": "[]x"}, USER, ANSWER], "has a turn with 'tools'"),
    "thinking blocks": ([USER, {**ANSWER, "reasoning_details": [{"text": "x"}]}], "has a turn with 'reasoning_details'"),
    "training detail": ([USER, {**ANSWER, "training_detail": [{"begin": 0}]}], "has a turn with 'training_detail'"),
    "thoughts of the user": ([{**USER, "reasoning": "x"}, ANSWER], "has 'reasoning' in a user turn"),
    "two thoughts": ([USER, {**ANSWER, "reasoning": "x", "thinking": "y"}], "different texts in reasoning and thinking"),
    "thoughts no text": ([USER, {**ANSWER, "reasoning": ["x"]}], "'reasoning' of a turn is not text"),
    "calls of the user": ([{**USER, "tool_calls": [CALL]}, ANSWER], "has tool_calls in a user turn"),
    "calls no objects": ([USER, {**ANSWER, "tool_calls": ["f"]}], "'tool_calls' is not a list of objects"),
    "two kinds of call": ([USER, {**ANSWER, "tool_calls": [CALL], "function_call": {"name": "f"}}], "has both tool_calls"),
    "contradiction": ([USER, {**ANSWER, "weight": 1, "train": False}], "weight and train contradict each other"),
    "an ignored turn": ([USER, {**ANSWER, "ignore": True}], "has a turn with 'ignore', which would mask the turn"),
    "loss of a turn": ([USER, {**ANSWER, "computeLoss": False}], "has a turn with 'computeLoss'"),
    "channel": ([USER, {**ANSWER, "channel": "analysis"}], "has a turn with 'channel', which may make it a thought"),
    "recipient": ([USER, {**ANSWER, "recipient": "functions.f"}], "has a turn with 'recipient'"),
    "attachments of a turn": ([{**USER, "attachments": [{"url": "x"}]}, ANSWER], "has a turn with 'attachments'"),
    "unknown role": ([USER, {**ANSWER, "role": "model"}], "has a turn with the role 'model': use one of system, user, assistant"),
    "surrogate in thoughts": ([USER, {**ANSWER, "reasoning": "\ud83d"}], "half a character"),
}  # fmt: skip


@pytest.mark.parametrize(("turns", "message"), BAD.values(), ids=BAD.keys())
def test_bad_turns_are_named(turns, message):
    with pytest.raises(InputError, match=message) as error:
        read(*turns)
    assert str(error.value).startswith("a.jsonl row 7")


def test_the_question_is_the_last_turn_of_the_user():
    called, reply = {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "5"}
    assert question([USER, called, reply]) == "q" and question([reply]) == "5" and question([]) == ""


def test_hashes_and_texts_see_every_field():
    called = {**ANSWER, "tool_calls": CALLS}
    hashes = {prompt_hash([USER, turn]) for turn in (ANSWER, called, {**ANSWER, "reasoning_content": CALLS})}
    assert len(hashes) == 3 and prompt_hash([USER], None, None) == prompt_hash([USER]) != prompt_hash([USER], "[]")
    assert prompt_hash([{**USER, "name": None}]) == prompt_hash([USER])
    assert answer_text(called) == f"a\n{CALLS}" and answer_text(ANSWER) == "a"
    assert present_fields({**USER, "name": None}) == USER


_TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
            "content": st.sampled_from(["a", "", None]),
        },
        optional={
            "tool_calls": st.sampled_from([[CALL], [], None, "x", CALLS]),
            "reasoning": st.sampled_from(["hm", None, 3]),
            "weight": st.sampled_from([0, 1, None, 0.5]),
            "name": st.sampled_from(["n", None]),
        },
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(turns=_TURNS, required=st.booleans(), mode=st.sampled_from(["last", "all"]))
def test_any_turns_keep_the_contract_or_are_refused(turns, required, mode):
    try:
        found = to_conversations({"messages": turns}, "row", mode, required)
    except InputError as error:
        assert str(error).startswith("row")
        return
    for conversation in found:
        check_conversation(conversation.messages, "row", required)
        assert all(isinstance(text, str) for turn in conversation.messages for text in turn.values())
        assert to_conversations(conversation.row(), "row", "last", required)[0].messages == conversation.messages
