"""Rule scorers by hand; sums, parameters and dotted paths; what is said about bad ones."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.rewards import GroupLabels, PromptGroup, ScorerSettings, check_scorer, find_scorer, make_scorer
from spin.alignment.rewards.math_answer import final_answer

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]


def label(name: str, *responses: str, reference: str | None = "#### 5", score_reference: bool = False) -> GroupLabels:
    scorer = make_scorer(ScorerSettings(name, score_reference=score_reference))
    return scorer.label([PromptGroup("p1", QUESTION, list(responses), reference)])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2\sqrt{3}}", r"2\sqrt3"),
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt3}2"),
        (r"\fbox{\sqrt{\frac{a_{1}}{b}}}", r"\sqrt{\frac{a_1}b}"),
        (r"\boxed{\dfrac34}", Fraction(3, 4)),
        (r"\boxed{\frac{-3}{4}}", Fraction(-3, 4)),
        (r"\boxed{1\frac12}", Fraction(3, 2)),
        (r"\boxed{42 \text{ apples}}", Fraction(42)),
        (r"\boxed{5 \text{ cm}^2}", Fraction(5)),
        (r"\boxed{x=5}", Fraction(5)),
        (r"\boxed{\$1{,}234.50}", Fraction(2469, 2)),
        (r"\boxed{50\%}", Fraction(50)),
        (r"\boxed{- 5}", Fraction(-5)),
        (r"\boxed{90^\circ}", Fraction(90)),
        (r"\boxed{10-3}", "10-3"),
        ("#### " + "9" * 5000, "9" * 5000),
        (r"\boxed{2x}", "2x"),
        (r"\boxed{1,2}", "1,2"),
        (r"\boxed{x^{2}+1}", "x^2+1"),
        (r"\boxed{\left(1, 2\right]}", "(1,2]"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{ }", None),
        (r"\boxed{7} and \boxed{3", Fraction(7)),
        (r"#### \boxed{7}", Fraction(7)),
        ("#### Step 4\nso\n\\boxed{\\pi}", r"\pi"),
        ("#### (1, 2)", "(1,2)"),
        ("#### 8 or 9", Fraction(8)),
        ("#### **5** (five)", Fraction(5)),
        ("#### yes\nindeed", "yes"),
        ("it is 7", Fraction(7)),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_math_answer_of_what_is_no_number():
    score = find_scorer("math_answer")
    assert score("", r"so \boxed{\left[1, 2\right)}", r"\boxed{[1,2)}") == 1.0
    assert score("", r"\boxed{[1,2)}", r"\boxed{[1,2]}") == 0.0
    assert score("", r"\boxed{2\sqrt{3}}", r"\boxed{2\sqrt3}") == 1.0
    # The last number of the box is 3 in both: as the answer of the first it would be wrong.
    assert score("", r"\boxed{2\sqrt{3}}", r"\boxed{3}") == 0.0
    assert score("", r"\boxed{2x}", "#### 2") == 0.0
    # No algebra: that is what math_verify is for.
    assert score("", r"\boxed{\frac{\pi}{2}}", r"\boxed{\pi/2}") == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("half of it\n#### 72", 1.0),
        ("#### -$1,234.50.", 1.0),
        ("#### 1/2\n\n", 1.0),
        (r"so \boxed{x+1}.", 1.0),
        ("\\[\n\\boxed{\\frac{1}{2}}\n\\]\n", 1.0),
        ("**\\boxed{4}**", 1.0),
        ("#### 72\nand more", 0.0),
        ("#### seventy", 0.0),
        ("####" + " " * 20_000 + "x", 0.0),
        (r"\boxed{4} But wait, it is 5.", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{4", 0.0),
        ("the answer is 72", 0.0),
        ("<think>\nwith a box\n</think>\n\\boxed{4}", 1.0),
        ("<think>\nI try \\boxed{4}", 0.0),  # truncated inside its thought
        ("", 0.0),
    ],
)
def test_format(response, score):
    assert find_scorer("format")("q", response, "") == score


def test_length_penalty_is_the_excess_as_a_share_of_the_target():
    default, short = find_scorer("length_penalty"), find_scorer("length_penalty:max_chars=4")
    assert [default("", "x" * count, "") for count in (0, 1000, 1500, 2000)] == [0.0, 0.0, -0.5, -1.0]
    assert [short("", text, "") for text in ("1234", " 1234 ", "123456")] == [0.0, 0.0, -0.5]


def test_a_sum_is_weighted():
    # 1 + 0.5 * 1 - 0.25 * (6/4 - 1) = 1.375;  0 + 0.5 * 1 - 0 = 0.5;  1 + 0 - 0.25 * (14/4 - 1) = 0.375
    name = "math_answer + 0.5*format + 0.25*length_penalty:max_chars=4"
    assert label(name, "#### 5", "####4", "the answer is 5").scores == [1.375, 0.5 - 0.25 * 0.25, 1 - 0.25 * 2.75]
    assert label("2*exact_match", "#### 5", "5").scores == [2.0, 0.0]
    assert label("-1*exact_match", "#### 5").scores == [-1.0]


def test_a_group_is_scored_with_its_last_user_turn_and_its_reference(tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("def told(*texts):\n    seen.append(texts)\n    return len(seen)\nseen = []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert label("told:told", "a", "b", reference="truth", score_reference=True) == GroupLabels(
        [1.0, 2.0], reference_score=3.0
    )
    assert label("told:told", "a", reference=None, score_reference=True) == GroupLabels([4.0])
    seen = sys.modules["told"].seen
    assert seen == [("2+3?", "a", "truth"), ("2+3?", "b", "truth"), ("2+3?", "truth", "truth"), ("2+3?", "a", "")]


CODE = """
import math

def two(prompt, response): return 1.0
def keyword(prompt, *, response, reference): return 1.0
def broken(prompt, response, reference): return 1 / (len(response) - 3)
def nothing(prompt, response, reference): return None
def infinite(prompt, response, reference): return -math.inf if response == "abc" else 0.0
def scaled(prompt, response, reference, *, scale=2.0): return scale

class Box:
    @staticmethod
    def good(prompt, response, reference): return 7

value = 3
"""


@pytest.fixture
def my_rules(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(CODE)
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_rules", "unfinished"):
        sys.modules.pop(name, None)


def test_a_dotted_path_is_a_function_of_the_current_folder(my_rules):
    assert label("my_rules:Box.good", "x").scores == [7.0]
    assert label("my_rules:scaled", "x").scores == [2.0]
    assert label("0.5*my_rules:scaled:scale=3+exact_match", "x").scores == [1.5]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_rules:two", "scorer 'my_rules:two' does not take three positional arguments: define it as two"),
        ("my_rules:keyword", "does not take three positional arguments"),
        ("my_rules:value", "value of scorer 'my_rules:value' is not callable"),
        ("my_rules:absent", "module my_rules has no absent: correct the scorer 'my_rules:absent'"),
        ("my_rules:Box.absent", r"module my_rules has no Box\.absent"),
        ("my_rules:", "does not name a function"),
        ("no_such_module:f", "module no_such_module of scorer .* cannot be imported .ModuleNotFoundError"),
        ("unfinished:f", "module unfinished of scorer .* cannot be imported .SyntaxError"),
        ("my_rules:scaled:size=3", "has no parameter 'size': it has scale"),
    ],
)
def test_bad_dotted_path_is_one_sentence(my_rules, name, sentence):
    with pytest.raises(InputError, match=sentence):
        check_scorer(ScorerSettings(name))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bleu", "unknown scorer 'bleu': choose one of exact_match, format, .*judge, .*or write module:function"),
        ("", "scorer '' has an empty term"),
        ("math_answer+", "has an empty term: join rules as in"),
        ("half*format", "'half' in the scorer's term 'half.format' is not a weight"),
        ("0*format", "'0' in the scorer's term .* is not a weight"),
        ("nan*format", "is not a weight"),
        ("math_answer+reward_model", "reward_model is a model and cannot be part of the sum"),
        (
            "length_penalty:max_chars=0",
            "max_chars of scorer length_penalty is '0': write a number above 0, such as 1000",
        ),
        ("length_penalty:max_chars=many", "max_chars of scorer length_penalty is 'many'"),
        ("length_penalty:words=3", "scorer length_penalty has no parameter 'words': it has max_chars"),
        ("exact_match:strict=1", "scorer exact_match has no parameter 'strict': it has none"),
    ],
)
def test_bad_name_is_one_sentence(name, sentence):
    with pytest.raises(InputError, match=sentence):
        check_scorer(ScorerSettings(name))


def test_a_model_is_no_rule_function():
    with pytest.raises(InputError, match="judge is a model, but only rule functions are supported here"):
        find_scorer("judge")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_rules:broken", r"scorer my_rules:broken failed on prompt p1, sample 1 \(ZeroDivisionError"),
        ("my_rules:nothing", "scorer my_rules:nothing returned None on prompt p1, sample 0: it must return a number"),
        ("my_rules:infinite", "returned -inf on prompt p1, sample 1: it must return a finite number"),
    ],
)
def test_a_failing_rule_names_its_row(my_rules, name, sentence):
    with pytest.raises(InputError, match=sentence):
        label(name, "ab", "abc")


@pytest.mark.parametrize("name", ["math_answer", "exact_match", "format + 0.5*math_answer"])
def test_comparing_with_nothing_is_refused(name):
    with pytest.raises(InputError, match=r"compares with the ground truth, but prompt p1 has none: choose another"):
        label(name, "5", reference=None)
    with pytest.raises(InputError, match=r"prompt p1 has none"):
        label(name, "5", reference=" ")
    assert label("format+length_penalty:max_chars=9", "#### 5", reference=None).scores == [1.0]


def test_a_failure_on_the_ground_truth_says_so(my_rules):
    with pytest.raises(InputError, match="failed on prompt p1, the ground truth"):
        label("my_rules:broken", "ab", reference="abc", score_reference=True)


def test_math_verify_is_refused_without_its_library(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the library math-verify: pip install 'selfplay-spin\[math\]'"):
        check_scorer(ScorerSettings("math_answer+math_verify"))


def test_math_verify_does_algebra():
    pytest.importorskip("math_verify")
    score = find_scorer("math_verify")
    assert score("", r"<think>\boxed{5}", r"\boxed{5}") == 0.0  # truncated inside its thought
    assert score("", r"\boxed{\frac{\pi}{2}}", r"\boxed{\pi/2}") == 1.0
    assert score("", r"so \boxed{(x+1)^2}", r"\boxed{x^2+2x+1}") == 1.0
    assert score("", r"\boxed{2\sqrt{3}}", r"#### \sqrt{12}") == 1.0
    assert score("", "it is 5", "#### 5") == 1.0
    assert score("", r"\boxed{[1,2)}", r"\boxed{[1,2]}") == 0.0
    assert score("", "I do not know", "#### 5") == 0.0


@pytest.mark.parametrize("name", ["exact_match", "math_answer"])
def test_a_thought_is_no_part_of_an_answer(name):
    score = find_scorer(name)
    assert score("", "<think>is it 6?</think>5", "<think>\n5 or 7\n</think>\n\n5") == 1.0
    assert score("", "<think>it is 5", "5") == 0.0  # truncated inside its thought
