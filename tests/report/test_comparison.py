"""`spin report A B`: when models of two runs are compared, and what is said if they cannot be."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.core.provenance import Provenance
from spin.alignment.evaluation.responses import read_responses, write_responses
from spin.alignment.report.collected import collect
from spin.alignment.report.comparison import comparison_page, labels_of, verdicts_between, why_incomparable
from spin.alignment.report.reported_run import open_reported_run
from tests.helpers import run_main
from tests.helpers.evaluations import share, write_evaluation, write_finished_run


@pytest.fixture
def runs(tmp_path):
    """Two runs with the same results."""
    return [write_finished_run(tmp_path / name) for name in ("one", "two")]


def labelled(runs):
    opened = [open_reported_run(run) for run in runs]
    return list(zip(labels_of(opened), map(collect, opened), strict=True))


def rewrite(run, change) -> None:
    """Change every row of the stored responses of a run."""
    for path in run.glob("*/eval.parquet"):
        rows = [
            {**row, "token_ids": [5]} | change(row)
            for some in read_responses(path).by_temperature.values()
            for row in some.values()
        ]
        write_responses(path, rows, Provenance(kind="evaluation"))
        summary = path.with_suffix(".json")
        shown = [{"prompt_id": rows[0]["prompt_id"], "responses": {}}]
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"samples": shown}))


def test_models_of_the_same_name_and_the_best_are_compared(runs):
    write_evaluation(runs[1] / "iter0", {0.0: share(100, 50), 1.0: share(100, 60)}, [2.0] * 100, [4] * 100)
    found = labelled(runs)
    assert [label for label, _ in found] == ["one/run", "two/run"]  # both folders are called run
    lines = verdicts_between(found)
    # The best of the second run is its changed iter0, so it is compared with the best of the first.
    assert lines[0].startswith(
        "two/run: iter0 against one/run: iter1: exact match at T=1 0.450 -> 0.600, difference +0.150"
    )
    assert lines[0].endswith("(better)")
    assert any(
        line.startswith("two/run: sft against one/run: sft: greedy exact match 0.500 -> 0.500") for line in lines
    )
    page = comparison_page(found)
    assert [row[0][0] for row in page.result_rows][:2] == ["one/run: sft", "one/run: sft_continued"]
    assert len(page.data["samples"]["answers"]["1"]) == 8 and page.data["runs"] == ["one/run", "two/run"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: {"prompt": "another"}, "different held-out prompts (such as p0)"),
        (lambda row: {"prompt_id": "q" + row["prompt_id"]}, "no held-out prompt in common"),
    ],
)
def test_models_with_other_prompts_are_not_compared(runs, change, reason):
    rewrite(runs[1], change)
    found = labelled(runs)
    (said,) = why_incomparable(found)
    assert reason in said
    page = comparison_page(found)
    assert page.verdicts == [] and page.data["samples"]["prompts"] == [] and page.warnings[0] == said


def test_models_with_another_metric_are_not_compared(runs):
    for path in runs[1].glob("*/eval.json"):
        path.write_text(path.read_text().replace("exact_match", "math_answer"))
    assert "different metrics (exact_match, math_answer)" in why_incomparable(labelled(runs))[0]


def test_what_cannot_be_compared_is_named(runs, tmp_path):
    code, _, err = run_main(cli.main, "report", runs[0], runs[0])
    assert code == 2 and "is given twice: name two runs to compare" in err
    code, _, err = run_main(cli.main, "report", runs[0], tmp_path / "nothing")
    assert code == 2 and "contains no run" in err
