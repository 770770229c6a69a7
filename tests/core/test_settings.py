"""Settings declared once: checks, flags, usage and tables that come from the declaration."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from spin.alignment.core.config import build
from spin.alignment.core.errors import InputError
from spin.alignment.core.flags import from_arguments, parser_of, to_arguments
from spin.alignment.core.key_tables import key_table, usage
from spin.alignment.core.settings import (
    changed_of,
    check_settings,
    part_of,
    recorded,
    same_as,
    set_by_run,
    setting,
    settings_of,
)


@dataclass(frozen=True)
class Part:
    """A part that programs share."""

    size: int = setting(4, "how large", ge=1)
    name: str = setting("a", "what it is called")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example of a program.

    Only the first paragraph is its description.
    """

    model: str = setting(help="the model, 100 % needed", group="first", set_by_run=True)
    rate: float = setting(0.5, "how fast", gt=0, le=1, recorded=True)
    part_size: int = same_as(Part, "size", default=8)
    number: int | Literal["auto"] = setting(0, "which one", ge=0)
    limit: int | None = setting(None, "how many", unset="all of them", ge=1)
    kind: Literal["keep", "drop"] = setting("keep", "what happens", group="second")
    words: list[str] = setting([], "some words")
    points: tuple[float, ...] = setting((0.0, 1.0), "some numbers", ge=0)
    params: dict[str, float | str] = setting({}, "some pairs")
    strict: bool = setting(False, "refuse more")

    def __post_init__(self) -> None:
        check_settings(self)


def parse(*arguments: str) -> Example:
    return from_arguments(Example, ["--model", "m", *arguments], "example.py")


def test_flags_become_the_types_of_the_fields():
    made = parse(
        *("--rate=1e-1", "--number", "auto", "--limit", "3", "--kind", "drop", "--words", "a", "b", "--words=c"),
        *("--points", "0.5", "--params", "mu=1", "k=x", "--strict", "--part_size", "2"),
    )
    assert made == Example(
        model="m",
        rate=0.1,
        part_size=2,
        number="auto",
        limit=3,
        kind="drop",
        words=["a", "b", "c"],
        points=(0.5,),
        params={"mu": "1", "k": "x"},
        strict=True,
    )
    assert parse() == Example(model="m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rat", "1"], "unknown argument --rat; did you mean '--rate'"),
        (["--rate", "fast"], "--rate is 'fast', which is not a number: correct the value"),
        (["--rate", "0"], "--rate is 0.0: set it to a number above 0 and at most 1"),
        (["--rate", "nan"], "--rate is nan: set it to"),
        (["--params", "mu=a\0b"], "--params is 'a\\x00b', which has a NUL character in it"),
        (["--part_size", "0"], "--part_size is 0: set it to 1 or more"),
        (["--part_size", "2.5"], "--part_size is '2.5', which is not a whole number"),
        (["--number", "all"], "--number is 'all', which is not a whole number or 'auto'"),
        (["--number", "-1"], "--number is -1: set it to 0 or more"),
        (["--limit", "0"], "--limit is 0: set it to 1 or more"),
        (["--kind", "maybe"], "--kind is 'maybe': choose one of keep, drop"),
        (["--points", "1", "-2"], "--points is -2.0: set it to 0 or more"),
        (["--params", "mu"], "--params contains 'mu': write each setting once as key=value"),
        (["--params", "mu=1", "mu=2"], "--params contains 'mu=2': write each setting once as key=value"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, message):
    with pytest.raises(InputError) as error:
        parse(*arguments)
    assert str(error.value).startswith(message)


def test_a_missing_flag_is_named():
    with pytest.raises(InputError, match="--model"):
        from_arguments(Example, [], "example.py")


def test_a_configuration_becomes_arguments_and_comes_back():
    made = Example(
        model="-m x", rate=0.25, number="auto", words=["--a", "b c"], points=(3.0,), params={"mu": "1"}, strict=True
    )
    arguments = to_arguments(made)
    assert "--kind=keep" not in arguments and "--strict" in arguments
    assert from_arguments(Example, arguments, "example.py") == made
    assert to_arguments(Example(model="m")) == ["--model=m"]


def test_python_callers_are_checked_as_well():
    made = Example(model=Path("folder/m"), rate=1, points=[2], words=("a",))
    assert (made.model, made.rate, made.points, made.words) == ("folder/m", 1.0, (2.0,), ["a"])
    with pytest.raises(InputError, match="rate is 'fast', which is not a number"):
        Example(model="m", rate="fast")
    with pytest.raises(InputError, match="rate is inf"):
        Example(model="m", rate=math.inf)
    with pytest.raises(InputError, match="kind is 'x': choose one of keep, drop"):
        Example(model="m", kind="x")


def test_a_section_may_write_a_single_value_for_a_list_and_pairs_both_ways():
    assert build(Example, {"model": "m", "words": "a", "points": 1}, "x") == Example(
        model="m", words=["a"], points=(1,)
    )
    assert build(Example, {"model": "m", "params": ["mu=1"]}, "x").params == {"mu": "1"}


def test_defaults_are_not_shared_between_instances():
    one, two = Example(model="a"), Example(model="b")
    one.words.append("x")
    assert two.words == []


def test_a_field_of_another_class_keeps_its_facts_and_finds_its_way_back():
    made = Example(model="m", part_size=3)
    assert part_of(made, Part, name="b") == Part(3, "b")
    assert changed_of(made, Part) == ["part_size"] and changed_of(Example(model="m"), Part) == []
    assert Example(model="m").part_size == 8


def test_facts_of_a_class():
    assert set_by_run(Example, Part) == ["model"]
    assert recorded(Example(model="m")) == {"rate": 0.5}


def test_help_has_every_sentence_and_default():
    text = " ".join(parser_of(Example, "example.py").format_help().split())
    assert "An example of a program." in text and "first paragraph" not in text
    assert "the model, 100 % needed" in text and "first:" in text and "second:" in text
    assert "how many (default: all of them)" in text and "{keep,drop}" in text and "N|auto" in text


def test_usage_and_table():
    lines = usage("program", "Does it.", (Part, Example), "More.").splitlines()
    assert lines[0] == "usage: program CONFIG.yaml [--key=value ...]"
    assert [line.split()[0] for line in lines if "(default: a)" in line or "(must be given)" in line] == [
        "name",
        "model",
    ]
    table = key_table(settings_of(Example).values(), Example, prefix="--").splitlines()
    assert table[0] == "| flag | default | meaning |"
    assert "| `--model` | must be given | the model, 100 % needed |" in table
    assert "| `--kind` | keep | `keep`, `drop`; what happens |" in table
    assert "| `--limit` | all of them | how many |" in table and "| `--points` | 0, 1 | some numbers |" in table


@pytest.mark.parametrize(
    "program",
    ["reformat", "generate", "convert_data", "estimate_weights", "evaluate_model", "run_spin", "run_sft", "run_online"],
)
def test_help_of_every_program_is_light(program):
    # Not `import spin.generate as program`: that name is the function of the Python API.
    code = f"import contextlib, importlib, sys\nprogram = importlib.import_module('spin.{program}')\n"
    code += "with contextlib.suppress(SystemExit): program.main(['--help'])\n"
    code += "sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 0 and "default" in ran.stdout, ran.stderr


@dataclass(frozen=True, kw_only=True)
class Free:
    """A program with settings of any kind."""

    values: dict[str, Any] = setting({}, "anything")
    size: float = setting(1.0, "how large", gt=0)

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["day=2024-01-02", "on=no", "n=3", "share=1.5"], {"day": "2024-01-02", "on": False, "n": 3, "share": 1.5}),
        (['{"day": "2024-01-02", "deep": {"a": [1, null]}}'], {"day": "2024-01-02", "deep": {"a": [1, None]}}),
    ],
)
def test_settings_of_any_kind_are_what_json_can_hold(given, expected):
    parsed = from_arguments(Free, ["--values", *given], "example")
    assert parsed.values == expected
    assert from_arguments(Free, to_arguments(parsed), "example") == parsed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"a": ' + "[" * 6000 + "]" * 6000 + "}", "not valid JSON .*recursion"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ("a=" + "[" * 3000, "nested deeper than 50 levels"),
        ("a=&x [*x]", "nested deeper than 50 levels"),
        ("a={b: 1, b: 2}", "the key 'b' occurs twice"),
    ],
)
def test_settings_of_any_kind_are_read_strictly(given, message):
    with pytest.raises(InputError, match=message) as refusal:
        from_arguments(Free, ["--values", given], "example")
    assert len(str(refusal.value)) < 400


def test_numbers_without_an_upper_bound_are_finite():
    with pytest.raises(InputError, match="size is inf: set it to a number above 0"):
        Free(size=math.inf)
