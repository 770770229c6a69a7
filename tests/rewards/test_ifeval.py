"""The scorer ifeval: IFEval's checkers on responses judged by hand, its four numbers, and what is said about bad rows."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import (
    Part,
    PromptGroup,
    Score,
    ScorerSettings,
    check_columns,
    check_scorer,
    find_scorer,
    make_scorer,
)
from tests.helpers import SHARED_DATA

needs_packages = pytest.mark.skipif(
    importlib.util.find_spec("if_verifiable") is None or importlib.util.find_spec("punkt") is None,
    reason="the extra 'ifeval' is not installed",
)
ROW = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
    "kwargs": [{}, {"relation": "less than", "num_sentences": 3}],
}


def score(response: str, row: dict = ROW) -> Score:
    labels = make_scorer(ScorerSettings("ifeval")).label(
        [PromptGroup("p1", [{"role": "user", "content": "Go."}], [response], columns=row)]
    )[0]
    assert labels.parts is not None and labels.scores[0] is not None
    return Score(labels.scores[0], labels.parts[0])


@needs_packages
@pytest.mark.parametrize(
    ("response", "strict", "loose"),
    [
        ("Dr. Smith went home at 5 p.m. He slept.", 2, 2),  # two sentences: abbreviations end none
        ("One. Two. Three.", 1, 1),
        ("Well, one. Two.", 1, 1),
        ("Sure, here it is:\nOne. Two.", 1, 2),  # loose also tries without the first line
        ("  \n", 0, 0),
        ("<think>a, b</think>One.", 2, 2),  # a thought is not part of the answer
    ],
)
def test_instructions_are_counted_by_hand(response, strict, loose):
    found = score(response)
    assert found.value == float(strict == 2)
    assert found.parts == {
        "prompt_strict": Part(float(strict == 2)),
        "prompt_loose": Part(float(loose == 2)),
        "instruction_strict": Part(strict, 2),
        "instruction_loose": Part(loose, 2),
    }


@needs_packages
@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({}, "the rule takes 'instruction_id_list'"),
        (ROW | {"kwargs": [{}]}, "2 instruction ids and 1 sets of arguments"),
        (ROW | {"instruction_id_list": ["punctuation:no_comma", "x:y"]}, "unknown instruction 'x:y'"),
        # The checkers would draw a missing argument at random.
        (ROW | {"kwargs": [{}, {"relation": "less than"}]}, "takes num_sentences, relation, but the row has relation"),
        (ROW | {"kwargs": [{}, {"relation": "around", "num_sentences": 3}]}, "refuses its arguments"),
    ],
)
def test_a_row_that_cannot_be_checked_is_named(row, sentence):
    with pytest.raises(InputError, match=f"scorer ifeval failed on prompt p1, sample 0: .*{sentence}"):
        score("One.", row)
    with pytest.raises(InputError, match=sentence):
        check_columns("ifeval", row)  # before a model is loaded


@needs_packages
def test_nulls_of_parquet_are_no_arguments():
    row = ROW | {"kwargs": [{"relation": None, "num_sentences": None}, ROW["kwargs"][1] | {"end_phrase": None}]}
    assert score("One.", row).value == 1.0


@needs_packages
@pytest.mark.skipif(not (SHARED_DATA / "ifeval").is_dir(), reason="the benchmark's prompts are not there")
def test_every_prompt_of_the_benchmark_can_be_checked():
    lines = (SHARED_DATA / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rule = find_scorer("ifeval")
    found = [
        rule(row["prompt"], "No comma here.", "", instruction_id_list=row["instruction_id_list"], kwargs=row["kwargs"])
        for row in rows
    ]
    assert len(found) == len(lines) >= 540
    assert sum(item.parts["instruction_strict"].count for item in found) == sum(
        len(row["instruction_id_list"]) for row in rows
    )


@pytest.mark.parametrize("package", ["if_verifiable", "punkt"])
def test_a_missing_package_is_one_sentence(monkeypatch, package):
    real = importlib.util.find_spec
    found = {"if_verifiable": True, "punkt": True, package: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else real(name))
    module = importlib.import_module("spin.alignment.rewards.ifeval")  # by its name alone it is the function
    monkeypatch.setattr(module, "_has_sentence_model", lambda: False)
    with pytest.raises(InputError, match=r"scorer ifeval needs .*pip install 'selfplay-spin\[ifeval\]'"):
        check_scorer(ScorerSettings("format+ifeval"))
