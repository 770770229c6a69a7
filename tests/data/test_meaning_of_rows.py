"""Columns, keys and texts that change what a row means: read as their tool means them, or refused by name; never ignored."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from spin.alignment.core.errors import InputError
from spin.alignment.data.columns import RowNotes
from spin.alignment.data.formats import to_conversations
from spin.alignment.data.preference_forms import converted_table
from spin.alignment.data.preferences import load_preferences, to_preferences

USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "assistant", "content": "No"},
)
QUESTION = {"question": "q", "answer": "a"}
TEXTS = {"prompt": "p", "chosen": "c", "rejected": "r"}
OWN = {"prompt_id": "p", "sample_index": 0, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
PRINTED = str([{"role": "user", "content": "Hi"}])


def answer(**keys):
    return {"messages": [USER, {**GOOD, **keys}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        # marks that mask a turn
        (answer(train_on_turn=False), "no assistant turn to train on"),
        (answer(training=False), "no assistant turn to train on"),
        (answer(learn=0), "no assistant turn to train on"),
        (answer(trained=False), "'trained', which would mask"),
        (answer(ignore_loss=True), "'ignore_loss', which would mask"),
        (answer(no_loss=True), "'no_loss'"),
        (answer(exclude=True), "'exclude'"),
        (answer(value="other"), "different texts in 'content' and 'value'"),
        # responses that were cut off
        (answer(finish_reason="length"), "cut off"),
        ({**QUESTION, "finish_reason": "length"}, "cut off"),
        ({**QUESTION, "stop_reason": "MAX_TOKENS"}, "cut off"),
        ({**QUESTION, "is_truncated": True}, "cut off"),
        # responses that may be bad
        ({**QUESTION, "correct": False}, "'correct', which is false"),
        ({**QUESTION, "passed": "False"}, "'passed', which is false"),
        ({**QUESTION, "deleted": True}, "'deleted', which is true"),
        ({**QUESTION, "rejected": True}, "'rejected', which is true"),
        (answer(is_rejected=True), "'is_rejected', which is true"),
        # parts of a prompt
        ({**QUESTION, "A": "x", "B": "y"}, "'A', which would change the prompt"),
        ({**QUESTION, "option_a": "x"}, "'option_a'"),
        ({**QUESTION, "retrieved_documents": ["x"]}, "'retrieved_documents'"),
        ({**QUESTION, "article": "x"}, "'article'"),
        ({**QUESTION, "supporting_facts": "x"}, "'supporting_facts'"),
        ({"prompt": "p", "response": "r", "suffix": "x"}, "'suffix'"),
        # turns as text, as tables of text have them
        ({"prompt": PRINTED, "response": "r"}, "'prompt' is the text of a list of turns"),
        ({"prompt": json.dumps([USER]), "response": "r"}, "'prompt' is the text of a list of turns"),
        (
            {"prompt": "p", "completion": json.dumps([{"content": "x", "role": "assistant"}])},
            "'completion' is the text",
        ),
    ],
)
def test_a_row_of_another_meaning_is_refused(row, says):
    with pytest.raises(InputError, match=says):
        to_conversations(row, "f row 0")


@pytest.mark.parametrize(
    "row",
    [
        answer(train_on_turn=True, ignore_loss=False, finish_reason="stop", value="Yo"),
        {**QUESTION, "finish_reason": "end_turn", "truncated": False, "correct": True, "deleted": False},
        {**QUESTION, "verified": False},  # not looked at, which does not make it a bad one
        {**QUESTION, "context_length": 5, "document_id": "d7", "option_count": 4, "article_url": "u", "num_facts": 2},
        {"prompt": '[{"role": "user"}] explain this JSON', "response": '["a", "b"]'},
    ],
)
def test_what_says_nothing_is_accepted(row):
    (found,) = to_conversations(row, "f row 0", notes=RowNotes())
    assert [turn["role"] for turn in found.messages] == ["user", "assistant"]


def pairs(**columns):
    return converted_table(iter([("f row 0", {**TEXTS, **columns})]), "f").to_pylist()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"swapped": True}, "'swapped' True, which may turn the preference around"),
        ({"is_tie": True}, "'is_tie'"),
        ({"winner": "rejected"}, "'winner'"),
        ({"preferred": "tie"}, "'preferred'"),
        ({"chosen_prompt": "x"}, "'chosen_prompt'"),
        ({"chosen_system": "x"}, "'chosen_system'"),
        ({"rejected_thoughts": "x"}, "'rejected_thoughts'"),
        ({"rejected_stop_reason": "length"}, "'rejected_stop_reason'"),
        ({"chosen_finish_reason": "content_filter"}, "'chosen_finish_reason' 'content_filter'"),
        ({"rejected_token_ids": [1.5]}, "a number with a fraction"),
        ({"rejected_token_ids": [1, None]}, "null in a list"),
        ({"sample_index": 0.5}, "a number with a fraction"),
        ({"real": [USER, GOOD], "generated": [USER, BAD]}, "'real' and 'generated' beside"),
        ({"chosen": PRINTED}, "'chosen' is the text of a list of turns"),
    ],
)
def test_a_pair_of_another_meaning_is_refused(columns, says):
    with pytest.raises(InputError, match=says):
        pairs(**columns)


def test_finish_reasons_of_other_tools_are_read():
    (row,) = pairs(chosen_finish_reason="end_turn", rejected_finish_reason="max_tokens")
    assert (row["chosen_finish_reason"], row["rejected_finish_reason"]) == ("stop", "length")


def test_a_whole_transcript_beside_its_prompt_is_not_repeated():
    prompt = "\n\nHuman: a\n\nAssistant:"
    (row,) = pairs(prompt=prompt, chosen=f"{prompt} b", rejected=f"{prompt} c")
    assert row["chosen"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_text_beside_whole_conversations_is_not_their_prompt():
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (row,) = pairs(**whole, prompt="what the conversation was made from")
    assert (row["chosen"], row["rejected"]) == (whole["chosen"], whole["rejected"])


def test_numbers_in_tables_of_text_are_numbers():
    (row,) = pairs(prompt_id="7", sample_index="3")
    assert (row["prompt_id"], row["sample_index"]) == ("7", 3)
    with pytest.raises(InputError, match="wrong type in 'sample_index'"):
        pairs(sample_index="x3")


def test_whole_numbers_and_winners_are_accepted():
    flags = {"tie": False, "rejected_truncated": False, "chosen_correct": True, "rejected_correct": False}
    (row,) = pairs(rejected_token_ids=[1.0, 2.0], winner="chosen", **flags)
    assert row["rejected_token_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"reasoning_content": "hm"}, "'reasoning_content' beside"),
        ({"chosen_reasoning": "hm"}, "'chosen_reasoning'"),
        ({"chosen": [USER, {**GOOD, "weight": 0}]}, "weight 0"),
        ({"chosen": [USER, {**GOOD, "prefix": True}]}, "'prefix'"),
        ({"chosen": [{**USER, "images": ["x"]}, GOOD], "rejected": [{**USER, "images": ["x"]}, BAD]}, "'images'"),
        ({"prompt": [{"role": "system", "content": "s"}, USER]}, "does not start with the turns in 'prompt'"),
        ({"rejected_finish_reason": "max_tokens"}, "'max_tokens'"),
        ({"rejected_token_ids": [1, None]}, "null in a list"),
        ({"rejected_token_ids": [1.5]}, "truncated"),
        ({"swapped": True}, "'swapped'"),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_projects_own_columns_exempt_a_row_from_nothing(tmp_path, columns, says, in_memory):
    with pytest.raises(InputError, match=says):
        own_pairs(tmp_path, columns, in_memory)


@pytest.mark.parametrize("in_memory", [False, True])
def test_columns_of_other_tools_are_read_beside_the_projects_own(tmp_path, in_memory):
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    columns = {"system": "Be brief", "functions": [{"name": "f"}], "chosen": [USER, {**GOOD, "tool_calls": calls}]}
    (row,) = own_pairs(tmp_path, columns, in_memory)
    assert row["chosen"][0]["content"] == row["rejected"][0]["content"] == "Be brief"
    assert json.loads(row["tools"])[0]["function"] == {"name": "f"}
    assert json.loads(row["chosen"][-1]["tool_calls"]) == calls


def own_pairs(folder, columns, in_memory):
    rows = [{**OWN, **columns}]
    if in_memory:
        return to_preferences(Dataset.from_list(rows), "rows").to_list()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train_prefs.parquet")
    return load_preferences(folder, "train").to_list()
