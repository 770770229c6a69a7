"""The long form's bookkeeping: parts that are continued, repeated, or left as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import __main__ as long_form

SIGNAL = {"how": "SIGTERM to all", "wrong": []}


def run(
    monkeypatch: pytest.MonkeyPatch, output: Path, reports: list[dict[str, Any]], *flags: str
) -> list[dict[str, Any]]:
    """Run the long form with reports from here, until they end; return the parts that it asked for."""
    asked: list[dict[str, Any]] = []

    def given(module: str, parts: dict[str, Any], *_: object) -> Any:
        asked.append(parts)
        yield from reports

    monkeypatch.setattr(long_form, "reports", given)
    monkeypatch.setattr(sys, "argv", ["tests.faults", "--output", str(output), *flags])
    long_form.main()
    return asked


def test_an_interrupted_part_is_continued_and_the_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "faults.json"
    started = {"how": "undisturbed", "planned": 60, "wrong": []}
    wrong = {**SIGNAL, "wrong": ["not equal: model"]}
    (first,) = run(monkeypatch, output, [started, SIGNAL, wrong], "--only", "spin-run-weights")
    assert first["spin-run-weights"]["done"] == 0
    kills = {"how": "kill", "count": 70, "wrong": []}
    run(monkeypatch, output, [{**started, "planned": 64}, kills], "--only", "writers")
    (second,) = run(monkeypatch, output, [started, SIGNAL], "--only", "spin-run-weights")
    assert second["spin-run-weights"]["done"] == 2
    parts = json.loads(output.read_text())["parts"]
    assert parts["spin-run-weights"]["done"] == 3 and parts["spin-run-weights"]["failures"] == [wrong]
    assert parts["writers"] == {"done": 70, "counts": {"undisturbed": 1, "kill": 70}, "failures": [], "planned": 64}
    assert run(monkeypatch, output, [], "--only", "writers") == []  # complete
    (again,) = run(monkeypatch, output, [started], "--only", "spin-run-weights", "--again")
    assert again["spin-run-weights"]["done"] == 0


def test_names_of_parts_are_unambiguous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(long_form.PARTS) == sum(map(len, long_form.LONG.values()))
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "faults.json", [], "--only", "weights")
