"""The summary's keys, verdicts and warnings, and the page made of them."""

from __future__ import annotations

import json
import re

import pytest

from spin import cli
from spin.alignment.evaluation.responses import read_responses
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.report.headline import headline
from spin.alignment.report.summary import evaluation_row
from spin.alignment.report.table import cells, markdown
from spin.alignment.report.verdicts import Measure, verdicts
from spin.alignment.report.warnings import warnings
from tests.helpers import run_main
from tests.helpers.evaluations import share, write_evaluation, write_finished_run
from tests.helpers.runs import tiny_run, write_config


@pytest.fixture
def finished_run(tmp_path):
    """A run directory with results, but no models."""
    return write_finished_run(tmp_path)


def test_report_writes_summary_plot_and_page(finished_run):
    code, out, _ = run_main(cli.main, "report", finished_run)
    assert code == 0 and "iter1" in out
    summary = json.loads((finished_run / "summary.json").read_text())
    assert [row["model"] for row in summary["rows"]] == ["sft", "sft_continued", "iter0", "iter1"]
    last = summary["rows"][-1]
    expected = {
        "greedy_exact": 0.4,
        "sampled_exact": 0.45,
        "sampled_exact_t05": 0.47,
        "nll": pytest.approx(0.44, rel=1e-3),
        "margin_se": 0.1,
        "identical_rate": 0.75,
        "reward_accuracy": 0.9,
        "margin": 1.5,
        "chosen_drift": -2.0,
        "mean_length": 10.0,
        "first_loss": 0.6931,
    }
    assert {key: last[key] for key in expected} == expected
    assert (finished_run / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (finished_run / "report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", page)
    assert r"\u003c0>" in page and "<0>" not in page  # what a model says is text, not HTML
    text = (finished_run / "report.md").read_text()
    assert text.startswith("# Self-play run run\n\nexact_match on 100 held-out prompts\n\n**iter1 is the best")
    assert "| iter1 | 0.400 ±0.094 |" in text and "## Verdicts" in text and "iter0/checkpoint" in text


def test_verdicts_and_warnings_of_that_run(finished_run):
    run_main(cli.main, "report", finished_run)
    summary = json.loads((finished_run / "summary.json").read_text())
    said = "\n".join(summary["verdicts"])
    # 10 prompts are answered by one of the two alone: p = 2 / 2^10.
    assert (
        "iter0 against the SFT start: exact match at T=1 0.300 -> 0.400, difference +0.100 ± 0.059 on the same 100 prompts, "
        "p = 0.002 (better)"
    ) in said
    assert "iter1 against the SFT start: greedy exact match 0.500 -> 0.400, difference -0.100" in said
    assert "iter1 against the iteration before (iter0): exact match at T=1 0.400 -> 0.450" in said
    assert re.search(
        "sft_continued against the SFT start: exact match at T=1 0.300 -> 0.310, .*p = 1 .no clear change", said
    )
    assert re.search("iter1 against continued SFT: greedy exact match 0.520 -> 0.400, .*p = 0.00049 .worse", said)
    # Every prompt is slightly better: clear on the same prompts, although each model's own interval is far wider.
    assert re.search(r"iter1 against the iteration before .iter0.: NLL .* 0.4\d+ -> 0.4\d+, .*p < 0.0001 .better", said)
    assert "sampled at T=0.5 reaches 0.450 without any training" in said
    warned = "\n".join(summary["warnings"])
    assert "iter0: the log-probability of the chosen responses fell by 2.00 nats" in warned
    assert "iter0: 75% of the responses equal the ground truth" in warned


def test_headline_of_that_run(finished_run):
    _, out, _ = run_main(cli.main, "report", finished_run)
    headline = json.loads((finished_run / "summary.json").read_text())["headline"]
    assert (headline["best"], headline["measure"]) == ("iter1", "sampled_exact")
    assert headline["sentence"] == (
        "iter1 is the best: exact match at T=1 0.450, +0.150 ± 0.070 against the SFT start, +0.140 ± 0.068 against continued SFT"
    )
    assert headline["advice"] == (
        "The gain has levelled off (iter1 against iter0: +0.050 ± 0.043, no clear change): more iterations of this kind "
        "promise little"
    )
    assert headline["caveats"][0] == "iter1 is worse than the SFT start in greedy exact match: -0.100 ± 0.059"
    assert headline["sentence"] in out and headline["advice"] in out


def scored(folder, name, right, role="policy", iteration=None):
    """A row of the summary and the responses of a model with ``right`` right answers of 100 at T=1."""
    write_evaluation(folder / name, {1.0: share(100, right)}, [1.0] * 100, [4] * 100)
    row = {"model": name, "role": role, "iteration": iteration, "n": 100, "sampled_exact": right / 100}
    return row, read_responses(folder / name / "eval.parquet")


@pytest.mark.parametrize(
    ("start", "first", "second", "sentence", "advice"),
    [
        (30, 50, 70, "b is the best", "Still improving (b against a: +0.200"),
        (30, 70, 50, "a is the best", "The last iteration is worse (b against a: -0.200 ± 0.079): stop, and use a"),
        (30, 31, 30, "No iteration is clearly better than the SFT start; the best is a", "No clear change between"),
        (30, 50, None, "a is the best", "a improves on its start: another iteration may help"),
        (50, 30, None, "No iteration is clearly better", ""),
    ],
)
def test_headlines(tmp_path, start, first, second, sentence, advice):
    found = [scored(tmp_path, "sft", start, "start"), scored(tmp_path, "a", first, iteration=0)]
    found += [scored(tmp_path, "b", second, iteration=1)] if second is not None else []
    said = headline([row for row, _ in found], {row["model"]: responses for row, responses in found})
    assert said["sentence"].startswith(sentence) and said["advice"].startswith(advice)
    assert bool(said["advice"]) == bool(advice)


def test_no_headline_without_a_scored_policy(tmp_path):
    row, responses = scored(tmp_path, "sft", 30, "start")
    assert headline([row], {"sft": responses}) == {}
    assert headline([row, {"model": "a", "role": "policy", "iteration": 0, "margin": 1.0}], {"sft": responses}) == {}


def test_a_run_of_the_shell_scripts_is_reported(finished_run):
    (finished_run / "run.yaml").unlink()
    for name in ("iter0", "iter1"):
        (finished_run / name / "checkpoint").mkdir()
        (finished_run / name / "metrics.json").rename(finished_run / name / "checkpoint" / "metrics.json")
        (finished_run / name / "checkpoint" / "inputs.json").write_text('{"beta": 0.25}')
    code, _, err = run_main(cli.main, "report", finished_run)
    assert code == 0, err
    summary = json.loads((finished_run / "summary.json").read_text())
    assert [row["model"] for row in summary["rows"]] == ["sft", "iter0", "iter1"]
    assert summary["headline"]["best"] == "iter1" and summary["rows"][-1]["margin"] == 1.5
    text = (finished_run / "report.md").read_text()
    assert "| iter1/checkpoint | iter0/checkpoint | iter0/checkpoint | iter1/pairs and iter0/pairs |" in text
    assert "| iter0/train | done | 3.0 s | 50% |" in text and "| all stages |" in text
    page = (finished_run / "report.html").read_text()
    assert "<summary>settings: iter0</summary>" in page and "<td>beta</td><td>0.25</td>" in page
    (finished_run / "iter0" / "checkpoint" / "inputs.json").write_text("[]")
    code, _, err = run_main(cli.main, "report", finished_run)
    assert code == 2 and "inputs.json is damaged" in err


def test_costs_have_a_price_if_one_is_given(finished_run):
    (finished_run / "run.yaml").unlink()
    (finished_run / "iter0" / "checkpoint").mkdir()
    code, _, err = run_main(cli.main, "report", finished_run, "--price_per_hour=1200")
    assert code == 0, err
    text = (finished_run / "report.md").read_text()
    assert "| peak memory | cost |" in text and "| iter0/train | done | 3.0 s | 50% | – | – | – | 1.00 |" in text


def test_only_prompts_that_both_models_have_are_compared(tmp_path):
    tokens = [5] * 8
    write_evaluation(tmp_path / "a", {0.0: [1.0, None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}, [5.0] * 8, tokens)
    write_evaluation(tmp_path / "b", {0.0: [0.0, 0.0, None, 0.0, 0.0, 0.0, 0.0, 0.0]}, [6.0] * 8, tokens)
    one, other = (read_responses(tmp_path / name / "eval.parquet") for name in "ab")
    greedy = Measure("greedy_exact", "greedy", "0").compare(one, other)
    assert (greedy.prompts, greedy.difference, greedy.p_value) == (6, 1.0, pytest.approx(2 / 64))
    nll = Measure("nll", "NLL", None).compare(one, other)
    assert nll.difference == pytest.approx(-0.2) and nll.is_clear
    assert Measure("sampled_exact", "T=1", "1").compare(one, other) is None


def test_a_model_of_an_older_version_is_shown_but_not_compared(finished_run):
    (finished_run / "iter0" / "eval.parquet").unlink()
    code, _, err = run_main(cli.main, "report", finished_run)
    assert code == 0, err
    summary = json.loads((finished_run / "summary.json").read_text())
    assert not any(line.startswith("iter0 against") for line in summary["verdicts"])
    assert any("iter0 is not compared with other models" in line for line in summary["warnings"])
    assert summary["rows"][2]["greedy_exact"] == 0.5


def test_skipped_held_out_rows_are_warned_of():
    row = {"model": "iter0", "role": "policy", "iteration": 0, "skipped": 2}
    assert warnings([row]) == ["iter0: 2 held-out rows or responses skipped: eval.json names them"]
    assert warnings([row | {"skipped": 0}]) == []


def test_warnings_of_length_saturation_and_cut():
    rows = [{"model": "sft", "role": "start", "iteration": None, "mean_length": 10.0}]
    rows.append(
        {
            "model": "iter0",
            "role": "policy",
            "iteration": 0,
            "mean_length": 13.0,
            "reward_accuracy": 1.0,
            "truncation_rate": 0.2,
            "identical_rate": 0.75,
        }
    )
    said = "\n".join(warnings(rows))
    assert "saturated" in said and "20% of the held-out" in said and "moved from 10.0 to 13.0" in said
    assert warnings(rows[:1]) == [] and verdicts(rows[:1], {}) == []
    # A run that drops such pairs, as the demo does, is not told to drop them.
    assert "teach nothing" in said and "teach nothing" not in "\n".join(warnings(rows, drops_identical=True))


def test_error_of_nll_is_that_of_the_rate(tmp_path):
    # The lengths differ, the rate does not: no error, although the sums vary widely.
    write_evaluation(tmp_path, {1.0: share(10, 5)}, [0.2 * n for n in range(1, 11)], list(range(1, 11)))
    row = evaluation_row(json.loads((tmp_path / "eval.json").read_text()))
    assert row["nll"] == pytest.approx(0.2) and row["nll_se"] == pytest.approx(0.0, abs=1e-12)
    assert row["nll_sequence_se"] > 0.1


def test_every_measured_quality_has_an_interval(finished_run):
    run_main(cli.main, "report", finished_run)
    row = json.loads((finished_run / "summary.json").read_text())["rows"][-1]
    named = ("greedy_exact", "sampled_exact", "sampled_exact_t05", "nll", "identical_rate", "mean_length")
    for key in (*named, "truncation_rate", "margin"):
        low, high = row[f"{key}_interval"]
        assert low <= row[key] <= high and row[f"{key}_se"] >= 0, key
    assert row["greedy_exact_interval"] == pytest.approx([0.3094, 0.4980], abs=1e-4)  # Wilson's, 40 of 100
    headings, cells_ = cells({"rows": [row]})
    assert cells_[0][headings.index("exact greedy")] == "0.400 ±0.094"


def test_table_leaves_out_measures_nobody_has():
    headings, rows = cells({"rows": [{"model": "sft", "nll": 0.25}, {"model": "iter0", "margin": 1.0}]})
    assert headings == ["model", "NLL", "margin"] and rows == [["sft", "0.2500", "–"], ["iter0", "–", "1.000"]]
    assert markdown(headings, rows).splitlines()[0] == "| model | NLL | margin |"


def test_report_of_a_run_without_results(tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path))
    load_run_config(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(config.read_text())
    code, _, err = run_main(cli.main, "report", tmp_path / "run")
    assert code == 2 and "no results yet" in err
