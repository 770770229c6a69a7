"""`spin run` under random signals, twice on one directory, and under a clock that jumps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.faults.__main__ import reports
from tests.faults.plan import SHORT

pytestmark = pytest.mark.slow

KINDS = SHORT["run_storm"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports("run_storm", KINDS, tmp_path_factory.mktemp("storm")):
        by_kind[report["part"]].append(report)
    return by_kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_interrupted_at_random_moments_ends_equal(found, kind):
    assert [report for report in found[kind] if report["wrong"]] == []
    signals = sum(" to " in report["how"] for report in found[kind])
    assert signals == KINDS[kind]["signals"] and found[kind][-1]["how"] == "finished"


def test_two_runs_on_one_directory_and_clocks_that_jump(found):
    how = [report["how"] for report in found["spin-run-offline"]]
    assert how[1:4] == ["changed dates", "two runs on one directory", "jumping clock"]
    assert [report for report in found["spin-run-offline"][1:4] if report["wrong"]] == []
