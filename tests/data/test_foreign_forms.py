"""Rows of other tools: the conversation that is read, pairs and labels under this project's names, columns by mapping."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import read_rows
from spin.alignment.data.column_mapping import column_mapping, with_columns
from spin.alignment.data.foreign_forms import FOREIGN_FORMS
from spin.alignment.data.formats import FORMATS, to_conversations
from spin.alignment.data.preferences import load_preferences
from spin.alignment.data.reformat import ReformatConfig, reformat

USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in
                       (("user", "2+3?"), ("assistant", "5"), ("assistant", "6")))  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
VERL = {
    "data_source": "openai/gsm8k",
    "ability": "math",
    "extra_info": {"index": 3, "split": "train"},
    "prompt": [USER],
}


def rule(answer: object) -> dict:
    return {**VERL, "reward_model": {"style": "rule", "ground_truth": answer}}


RECORDS = {
    "verl": (rule("5"), [USER, ANSWER]),
    "verl number": (rule(5), [USER, ANSWER]),
    "verl list": (rule(["5"]), [USER, ANSWER]),
    "verl system": ({**rule("5"), "prompt": [SYSTEM, USER]}, [SYSTEM, USER, ANSWER]),
    "verl text": ({**rule("5"), "prompt": "2+3?"}, [USER, ANSWER]),
    "orca": ({"id": "niv.1", "system_prompt": "", "question": "2+3?", "response": "5"}, [USER, ANSWER]),
    "orca system": (
        {"system_prompt": "Be brief.", "question": "2+3?", "response": "5"},
        [SYSTEM, USER, ANSWER],
    ),
    "dolly": ({"instruction": "2+3?", "context": "", "response": "5", "category": "qa"}, [USER, ANSWER]),
    "dolly context": (
        {"instruction": "Add.", "context": "2+3", "response": "5"},
        [{"role": "user", "content": "Add.\n\n2+3"}, ANSWER],
    ),
    "evol": ({"instruction": "2+3?", "response": "5"}, [USER, ANSWER]),
    "math": ({"problem": "2+3?", "level": "Level 1", "type": "Algebra", "solution": "5"}, [USER, ANSWER]),
    "numina": ({"source": "x", "problem": "0?", "solution": "0", "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "aime": ({"problem": "2+3?", "answer": "5"}, [USER, ANSWER]),
    "math with answer": ({"problem": "2+3?", "solution": "5", "answer": "x"}, [USER, ANSWER]),
    "openmath": ({"problem": "2+3?", "generated_solution": "5", "expected_answer": "x"}, [USER, ANSWER]),
    "openmath 1": ({"question": "2+3?", "generated_solution": "5"}, [USER, ANSWER]),
    "question solution": ({"question": "2+3?", "solution": "5"}, [USER, ANSWER]),
    "question response": ({"question": "2+3?", "response": "5"}, [USER, ANSWER]),
    "metamath": ({"query": "2+3?", "response": "5", "type": "x", "original_question": "y"}, [USER, ANSWER]),
    "query answer": ({"query": "2+3?", "answer": "5"}, [USER, ANSWER]),
    "flan": ({"inputs": "2+3?", "targets": "5"}, [USER, ANSWER]),
    "input output": ({"input": "2+3?", "output": "5"}, [USER, ANSWER]),
    "openai": (
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
        [USER, ANSWER],
    ),
    "safe rlhf": (
        {"prompt": "2+3?", "response_0": "6", "response_1": "5", "better_response_id": 1, "safer_response_id": 0},
        [USER, ANSWER],
    ),
    "openai chat": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
}


@pytest.mark.parametrize(("record", "messages"), RECORDS.values(), ids=RECORDS.keys())
def test_the_conversation_of_a_foreign_row(record, messages):
    (conversation,) = to_conversations(record, "row")
    assert conversation.messages == messages
    assert to_conversations(record, "row", ground_truth_required=False) == [conversation]


def test_every_foreign_form_is_tested_and_registered():
    used = {columns for columns in FOREIGN_FORMS if any(set(columns) <= set(record) for record, _ in RECORDS.values())}
    assert used == FOREIGN_FORMS.keys() and FOREIGN_FORMS.keys().isdisjoint(FORMATS)


def test_verl_prompts_without_a_ground_truth():
    for reward_model in ({"style": "model"}, {"style": "model", "ground_truth": None}):
        record = {**VERL, "reward_model": reward_model}
        assert to_conversations(record, "row", ground_truth_required=False)[0].messages == [USER]
        with pytest.raises(InputError, match="row has no assistant turn"):
            to_conversations(record, "row")


BAD = {
    "verl answers": (rule(["5", "6"]), "'reward_model.ground_truth' is list, not text"),
    "verl truth value": (rule(True), "'reward_model.ground_truth' is bool"),
    "verl nan": (rule(float("nan")), "'reward_model.ground_truth' is float"),
    "verl reward": ({**VERL, "reward_model": "rule"}, "'reward_model' is str, not an object"),
    "openai input": ({"input": "x", "preferred_output": [], "non_preferred_output": []}, "'input' must be an object"),
    "safe rlhf": ({"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": 2}, "neither 0 nor 1"),
    "two names": ({"question": "x", "prompt": "y", "solution": "z"}, "has both 'question' and 'prompt'"),
    "id list": ({"id": [1], "prompt": "x", "response": "y"}, "'id' is list, not a text or a number"),
    "id surrogate": ({"id": "\ud83d", "prompt": "x", "response": "y"}, r"half a character\) in 'id'"),
    "id digits": ({"id": 10**5000, "prompt": "x", "response": "y"}, "'id' is too large a number"),
}


@pytest.mark.parametrize(("record", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_foreign_rows_are_named(record, sentence):
    with pytest.raises(InputError, match=sentence):
        to_conversations(record, "row")


@pytest.mark.parametrize(("given", "expected"), [(7, "7"), (7.0, "7"), ("x", "x"), ("7", "7"), (2.5, "2.5")])
def test_ids(given, expected):
    assert to_conversations({"id": given, "prompt": "x", "response": "y"}, "row")[0].prompt_id == expected
    for missing in (None, "", float("nan")):
        hashed = to_conversations({"id": missing, "prompt": "x", "response": "y"}, "row")[0].prompt_id
        assert hashed == to_conversations({"prompt": "x", "response": "y"}, "row")[0].prompt_id


def write_lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_pairs_of_sppo_train_with_its_losses(tmp_path):
    pairs = {"chosen": [[USER, ANSWER]], "rejected": [[USER, OTHER]], "chosen_probs": [0.9],
             "chosen_probs_win": [0.75], "chosen_probs_lose": [0.25]}  # fmt: skip
    pq.write_table(pa.table(pairs), tmp_path / "train.parquet")
    (row,) = load_preferences(tmp_path, "train").to_list()
    assert (row["chosen_win_prob"], row["rejected_win_prob"]) == (0.75, 0.25)
    assert row["chosen_pair_win_prob"] == 0.9 and row["rejected_pair_win_prob"] == pytest.approx(0.1)
    assert not any("probs" in name for name in row)


def test_labels_of_own_rows_are_renamed_too(tmp_path):
    own = {"prompt_id": "a", "sample_index": 0, "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    pq.write_table(
        pa.Table.from_pylist([{**own, "score_chosen": 2.0, "score_rejected": 1.0}]), tmp_path / "train.parquet"
    )
    assert load_preferences(tmp_path, "train").to_list() == [{**own, "chosen_score": 2.0, "rejected_score": 1.0}]


PAIR = {"prompt": "2+3?", "chosen": "5", "rejected": "6"}
PAIRS = {
    "openai": {"input": {"messages": [SYSTEM, USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
    "safe rlhf": {"prompt": "2+3?", "response_0": "6", "response_1": "5", "better_response_id": 1},
    "ultrafeedback": {**PAIR, "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER], "score_chosen": 2,
                      "score_rejected": 1},
}  # fmt: skip


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS.keys())
def test_foreign_pairs(tmp_path, row):
    (pair,) = load_preferences(write_lines(tmp_path / "a.jsonl", row), "train").to_list()
    assert (pair["chosen"][-2:], pair["rejected"][-2:]) == ([USER, ANSWER], [USER, OTHER])
    assert pair.get("chosen_score") == row.get("score_chosen")


def test_the_tools_of_a_foreign_pair_are_kept(tmp_path):
    row = {**PAIRS["openai"], "input": {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}}
    (pair,) = load_preferences(write_lines(tmp_path / "a.jsonl", row), "train").to_list()
    assert json.loads(pair["tools"]) == row["input"]["tools"]


def test_a_score_of_one_response_is_no_label_of_the_pair(tmp_path):
    (pair,) = load_preferences(write_lines(tmp_path / "a.jsonl", {**PAIR, "score_chosen": 2}), "train").to_list()
    assert pair.keys() == {"prompt_id", "sample_index", "chosen", "rejected"}


BAD_PAIRS = {
    "tis-dpo": (
        {**PAIR, "chosen_weight": [0.5]},
        "has 'chosen_weight' but no list 'rejected_weight': TIS-DPO's files have both",
    ),
    "one win rate": ({**PAIR, "chosen_probs_lose": 1}, "has 'chosen_probs_lose' but no 'chosen_probs_win'"),
    "two scores": (
        {**PAIR, "score_chosen": 1, "score_rejected": 0, "chosen_score": 3},
        "both 'score_chosen' and 'chosen_score'",
    ),
    "score text": ({**PAIR, "score_chosen": "1", "score_rejected": "0"}, "'score_chosen' is str, not a number"),
    "id": (
        {**PAIR, "prompt_id": "\ud83d"},
        r"a.jsonl row 0 has an unpaired surrogate \(half a character\) in 'prompt_id'",
    ),
    "rejected": ({**PAIR, "rejected": "\ud83d"}, r"the rejected response has an unpaired surrogate"),
    "reason": ({**PAIR, "rejected_finish_reason": "\ud83d"}, "'rejected_finish_reason' '"),
    "sample": ({**PAIR, "sample_index": 10**30}, "row 0 has a value of the wrong type in 'sample_index'"),
    "label": ({**PAIR, "chosen_x": 10**400, "rejected_x": 1}, "row 0 has a value of the wrong type in 'chosen_x'"),
}


@pytest.mark.parametrize(("row", "sentence"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_bad_foreign_pairs_are_named(tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        load_preferences(write_lines(tmp_path / "a.jsonl", row), "train")
    assert str(error.value).encode()


def test_large_whole_numbers_are_labels(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {**PAIR, "chosen_x": 10**20, "rejected_x": 1})
    assert load_preferences(path, "train")["chosen_x"] == [1e20]


def test_columns_are_mapped_before_the_format_is_recognised():
    record = {"messages": "x", "query": "2+3?", "extra": {"solution": "5"}, "a.b": "c", "id": "i"}
    mapping = column_mapping({"prompt": "query", "response": "extra.solution"})
    assert with_columns(record, mapping, "row") == {"a.b": "c", "id": "i", "prompt": "2+3?", "response": "5"}
    assert with_columns(record, {"response": "a.b"}, "row")["response"] == "c"
    assert with_columns({"prompt": "a", "response": "b"}, {"prompt": "response", "response": "prompt"}, "row") == {
        "prompt": "b", "response": "a",
    }  # fmt: skip
    verl = {"prompt": [USER], "reward_model": {}, "messages": [], "extra_info": {"answer": "5"}}
    assert with_columns(verl, {"response": "extra_info.answer"}, "row") == {"prompt": [USER], "response": "5"}
    pair = {"q": "2+3?", "chosen": "5", "rejected": "6", "messages": []}
    assert with_columns(pair, {"prompt": "q"}, "row") == {"prompt": "2+3?", "chosen": "5", "rejected": "6"}
    assert column_mapping({"prompt": "query,response=solution"}) == {"prompt": "query", "response": "solution"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"promt": "x"}, "columns maps 'promt', which no format has: map one of .*; did you mean 'prompt'\\?"),
        ({"prompt": ""}, "columns maps 'prompt' to ''"),
        ({"prompt": "a,prompt=b"}, "give each name one column"),
    ],
)
def test_a_bad_mapping_is_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        column_mapping(given)


def test_reformat_with_columns(tmp_path):
    data = write_lines(tmp_path / "a.csv") and tmp_path / "a.csv"
    data.write_text("q,long,short\n2+3?,5,x\n")
    mapped = {"data": str(data), "output_dir": str(tmp_path / "out"), "columns": {"prompt": "q", "response": "long"}}
    reformat(ReformatConfig(**mapped))
    assert [row["chosen"] for row in read_rows(tmp_path / "out" / "train.parquet")] == [[USER, ANSWER]]
    with pytest.raises(InputError, match=r"contains different data .*columns"):
        reformat(ReformatConfig(**{**mapped, "columns": {"prompt": "q", "response": "short"}}))
    with pytest.raises(InputError, match=r"a.csv row 0 has no column 'lang' .*did you mean 'long'"):
        reformat(
            ReformatConfig(
                **{**mapped, "output_dir": str(tmp_path / "b"), "columns": {"prompt": "q", "response": "lang"}}
            )
        )
