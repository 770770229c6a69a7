"""The columns of a row as arguments of a rule: those its signature asks for, by name."""

from __future__ import annotations

import functools

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import PromptGroup
from spin.alignment.rewards.find import WeightedSum
from spin.alignment.rewards.row_columns import asked_columns, score_response
from spin.alignment.rewards.rules import RuleScorer

COLUMNS = {"limit": 3, "source": "web", "words": 9, "prompt": "no", "response": "no"}


def plain(prompt, response, reference):
    return float(len(response))


def required(prompt, response, reference, limit):
    return float(limit)


def by_keyword(prompt, response, reference, *, source, kind=None):
    return float(len(source) + (kind is None))


def with_setting(prompt, response, reference, *, words=50):
    return float(words)


def everything(question, answer, truth, *, words=1, **columns):
    assert columns == {"limit": 3, "source": "web"} and (question, answer) == ("q", "a")
    return float(words)


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        (plain, 1),
        (required, 3),
        (by_keyword, 4),
        (with_setting, 50),  # a number as default is a setting, never a column
        (functools.partial(with_setting, words=2), 2),
        (everything, 1),
        (WeightedSum(((2.0, required), (1.0, plain), (0.5, functools.partial(with_setting, words=4)))), 9),
    ],
)
def test_a_rule_gets_what_it_asks_for(rule, score):
    assert score_response(rule, "q", "a", "t", COLUMNS) == score


def test_a_rule_without_a_signature_gets_the_texts_alone():
    assert asked_columns(min).select(COLUMNS) == {}


@pytest.mark.parametrize("rule", [required, WeightedSum(((1.0, plain), (1.0, required)))])
def test_a_missing_column_is_named_with_its_row(rule):
    scorer = RuleScorer("my:rule", rule)
    group = PromptGroup("p1", [{"role": "user", "content": "q"}], ["a"], columns={"source": "web"})
    message = r"scorer my:rule failed on prompt p1, sample 0: the rule takes 'limit', but the row has no such column .*\(it has"
    with pytest.raises(InputError, match=message):
        scorer.label([group])
    assert scorer.label([PromptGroup("p1", group.prompt, ["a"], columns=COLUMNS)])[0].scores[0] >= 3
