"""Verifiable instructions: every kind against texts by hand, the score of a row, and what is said about bad rows."""

from __future__ import annotations

import json

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import PromptGroup, ScorerSettings, check_columns, make_scorer
from spin.alignment.rewards.instructions import KINDS
from spin.alignment.rewards.instructions.degenerate import is_degenerate
from spin.alignment.rewards.instructions.rows import arguments_of

# kind, arguments, texts that follow it, texts that do not
CASES = [
    ("no_commas", {}, ["All is well; go on.", ""], ["Yes, it is.", "是的，很好"]),
    ("no_digits", {}, ["Two of them."], ["Only 2 of them.", "٣"]),
    ("lower_case", {}, ["all is well. it's 5.", "ä ö"], ["All is well.", "12345", ""]),
    ("upper_case", {}, ["ALL IS WELL. 5!"], ["ALL is WELL.", "12345"]),
    ("at_most_words", {"count": 3}, ["one two three", "it's well-known", "2.5 of 10"], ["one two three four"]),
    ("at_least_words", {"count": 3}, ["one two three", "a b c d"], ["well-known fact", "- - - -"]),
    ("sentences", {"count": 2}, ["One. Two!", "Mr. Fox ran. He won.", '"Go!" He went.', "One. two"], ["One.", "A. B. C."]),
    ("sentences", {"count": 2}, ["It is 2.5 km. Far."], ["It is 2.5 km."]),
    ("sentences", {"count": 1}, ["No end mark", "Really?! ", "1. One point, e.g. this"], ["", "One. Two."]),
    ("lines", {"count": 2}, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
    ("paragraphs", {"count": 2}, ["a\nb\n\nc", "a\n \n\nb"], ["a\nb", "a\n\nb\n\nc"]),
    ("bullets", {"count": 2}, ["- a\n- b", "Here:\n* a\n  • b"], ["- a", "- a\n- b\n- c", "-a\n-b", "a - b - c"]),
    ("numbered_list", {"count": 2}, ["1. a\n2. b", "So:\n1) a\n\n2) b\nDone."], ["1. a\n3. b", "1. a\n2. b\n3. c", "2. a\n1. b"]),
    ("bold", {"count": 2}, ["**a** and **b c**"], ["**a**", "** a ** and ** b **", "*a* and *b*", "__a__ __b__"]),
    ("json_object", {"keys": ["a", "b"]}, ['{"b": 1, "a": [2]}', '```json\n{"a": 1, "b": 2}\n```'], ['{"a": 1}', "[1]", "a: 1"]),
    ("json_object", {"keys": ["a"]}, ['{"a": {"b": 2}}'], ['{"a": 1, "b": 2}', "[", ""]),
    ("answer_option", {"options": ["Yes", "It depends."]}, ["Yes", "Yes.", "It depends"], ["yes", "Yes, it is.", "No", ""]),
    ("starts_with", {"text": "My friend,"}, ["My friend, go."], ["my friend, go.", "Well. My friend,"]),
    ("ends_with", {"text": "The end."}, ["So. The end."], ["The end. Really.", "the end."]),
    ("ends_with_question", {}, ["Is it?"], ["It is.", "Is it? Yes"]),
    ("every_line_starts_with", {"text": ">"}, ["> a\n\n>b"], ["> a", "> a\nb"]),
    ("quoted", {}, ['"All of it."', "“All of it.”"], ['"One" and "two"', "'All'", '"', '""', '"open']),
    ("title", {"opening": "[[", "closing": "]]"}, ["[[Sea]]\nText"], ["[[Sea]]", "[[ ]]\nText", "Sea\n[[x]]", "[[Sea]] Text"]),
    ("includes", {"word": "sea"}, ["The SEA.", "sea-side"], ["seaside", "ocean"]),
    ("includes", {"word": "sea", "count": 2}, ["Sea and sea"], ["sea"]),
    ("excludes", {"words": ["the", "of it"]}, ["Then, often."], ["The end.", "all of it"]),
]  # fmt: skip


def test_every_kind_has_cases():
    assert {kind for kind, *_ in CASES} == set(KINDS) and len(KINDS) >= 16


@pytest.mark.parametrize(("kind", "arguments", "followed", "broken"), CASES)
def test_a_kind(kind, arguments, followed, broken):
    assert set(arguments) <= set(arguments_of(KINDS[kind]))
    for text in followed:
        assert KINDS[kind](text, **arguments) is True, text
    for text in broken:
        assert KINDS[kind](text, **arguments) is False, text


def score(response: str, *asked: tuple[str, dict], name: str = "instructions", as_text: bool = False) -> float:
    rows = [{"kind": kind, "arguments": arguments} for kind, arguments in asked]
    column = json.dumps(rows) if as_text else rows
    group = PromptGroup("p1", [{"role": "user", "content": "Go."}], [response], columns={"instructions": column})
    return make_scorer(ScorerSettings(name)).label([group])[0].scores[0]


def test_the_score_is_the_share_that_is_followed_or_all_or_nothing():
    asked = (("lower_case", {}), ("no_commas", {}), ("at_most_words", {"count": 9}))
    assert score("all of it goes on", *asked) == 1
    assert score("All of it, all day", *asked) == pytest.approx(1 / 3)
    assert score("All of it, all day", *asked, name="instructions:strict=1") == 0
    assert score(" all of it goes on\n", *asked, name="instructions:strict=1", as_text=True) == 1


@pytest.mark.parametrize(
    "response", ["", "  ", "ok", "no no no no no", "the sea " * 20, "a b c", "one two three four " * 8]
)
def test_saying_nothing_follows_no_instruction(response):
    assert is_degenerate(response)
    assert score(response, ("no_commas", {})) == 0


def test_a_short_answer_counts_where_one_is_asked_for():
    assert score("Yes", ("answer_option", {"options": ["Yes", "No"]})) == 1
    assert score("", ("answer_option", {"options": ["Yes", "No"]})) == 0
    assert not is_degenerate("Bees carry pollen from flower to flower, and so the flowers can make seeds.")


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (None, "'instructions' is None: write a list"),
        ([], "'instructions' is []: write a list"),
        ("[{", "'instructions' is not JSON text"),
        (["bullets"], "contains 'bullets': write an object with 'kind'"),
        ([{"kind": "bullets", "count": 3}], "write an object with 'kind'"),
        ([{"kind": "bulets"}], "unknown instruction 'bulets': choose one of answer_option, "),
        ([{"kind": "bulets"}], "upper_case; did you mean 'bullets'?"),
        ([{"kind": "bullets"}], "the instruction bullets needs the argument 'count': a whole number"),
        (
            [{"kind": "bullets", "arguments": {"count": 0}}],
            "'count' of the instruction bullets is 0: write a whole number",
        ),
        ([{"kind": "bullets", "arguments": {"count": True}}], "is True: write a whole number"),
        ([{"kind": "bullets", "arguments": {"count": 2, "mark": "-"}}], "bullets has no argument 'mark': it has count"),
        ([{"kind": "no_commas", "arguments": {"count": 2}}], "no_commas has no argument 'count': it has none"),
        ([{"kind": "excludes", "arguments": {"words": "sea"}}], "is 'sea': write a list of texts"),
        ([{"kind": "ends_with", "arguments": {"text": ""}}], "is '': write a text"),
    ],
)
def test_a_bad_column_is_named_before_anything_is_scored(column, says):
    with pytest.raises(InputError) as caught:
        check_columns("0.5*instructions+format", {"instructions": column})
    assert says in str(caught.value)


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match=r"takes 'instructions', but the row has no such column .* \(it has words\)"):
        check_columns("instructions:strict=1", {"words": 3})
    check_columns("format", {})


def test_null_arguments_of_rows_from_parquet_are_left_out():
    row = [{"kind": "bullets", "arguments": {"count": 2, "text": None}}, {"kind": "no_commas", "arguments": None}]
    check_columns("instructions", {"instructions": row})
