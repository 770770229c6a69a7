"""The summary's keys, verdicts and warnings, and the page made of them."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.report.summary import compare, evaluation_row, verdicts, warnings
from spin.alignment.report.table import cells, markdown
from tests.helpers import run_main
from tests.helpers.runs import tiny_run, write_config


def scores(exact: float, length: float = 10.0, cut: float = 0.0) -> dict[str, float]:
    return {"exact": exact, "exact_se": 0.01, "identical_rate": exact, "truncation_rate": cut, "mean_length": length}


def evaluation(greedy: float, sampled: float, cooler: float, nll: float) -> dict[str, object]:
    samples = [{"prompt_id": "p", "prompt": "3+1", "truth": "4", "responses": {"0": f"<{greedy}>", "1": "5"}}]
    temperatures = {"0": scores(greedy), "1": scores(sampled), "0.5": scores(cooler)}
    nlls = {"nll": nll, "nll_sequence": 10 * nll, "nll_sequence_se": 0.1}
    return {"metric": "exact_match", "n": 100, "temperatures": temperatures, "samples": samples, **nlls}


@pytest.fixture
def finished_run(tmp_path):
    """A run directory with results, but no models."""
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, control={"max_steps": 1}))
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text(config.read_text())
    numbers = {"sft": (0.5, 0.3, 0.45, 0.5), "control": (0.52, 0.31, 0.46, 0.48)}
    numbers |= {"iter0": (0.5, 0.4, 0.45, 0.45), "iter1": (0.4, 0.45, 0.47, 0.44)}
    for name, values in numbers.items():
        (run_dir / name / "pairs").mkdir(parents=True)
        (run_dir / name / "eval.json").write_text(json.dumps(evaluation(*values)))
        if name.startswith("iter"):
            final = {"rewards/accuracies": 0.9, "rewards/margins": 1.5, "drift/chosen": -2.0}
            metrics = {"first_loss": 0.6931, "seconds": 3.0, "final": final}
            (run_dir / name / "metrics.json").write_text(json.dumps(metrics))
            counts = {"rows": 24, "identical": 18, "truncated": 0, "dropped": 18, "written": 6}
            (run_dir / name / "pairs" / "train_prefs.counts.json").write_text(json.dumps(counts))
    return run_dir


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
        "nll": 0.44,
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
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert "&lt;0.4&gt;" in page and "<0.4>" not in page  # what a model says is text, not HTML


def test_verdicts_and_warnings_of_that_run(finished_run):
    run_main(cli.main, "report", finished_run)
    summary = json.loads((finished_run / "summary.json").read_text())
    said = "\n".join(summary["verdicts"])
    assert "iter0 against the SFT start: exact match at T=1 0.300 -> 0.400 (better)" in said
    assert "iter1 against the SFT start: greedy exact match 0.500 -> 0.400 (worse)" in said
    assert "sft_continued against the SFT start: exact match at T=1 0.300 -> 0.310 (no clear change)" in said
    assert "iter1 against continued SFT: greedy exact match 0.520 -> 0.400 (worse)" in said
    assert "sampled at T=0.5 reaches 0.450 without any training" in said
    warned = "\n".join(summary["warnings"])
    assert "iter0: the log-probability of the chosen responses fell by 2.00 nats" in warned
    assert "iter0: 75% of the responses equal the ground truth" in warned


def test_two_standard_errors_by_hand():
    # sqrt(0.03^2 + 0.04^2) = 0.05, so a difference is clear beyond 0.10
    row, other = {"x": 0.61, "e": 0.03}, {"x": 0.50, "e": 0.04}
    assert compare(row, other, "x", "e") == (pytest.approx(0.11), True)
    assert compare({**row, "x": 0.59}, other, "x", "e") == (pytest.approx(0.09), False)
    assert compare(row, {}, "x", "e") is None


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
    assert warnings(rows[:1]) == [] and verdicts(rows[:1]) == []
    # A run that drops such pairs, as the demo does, is not told to drop them.
    assert "teach nothing" in said and "teach nothing" not in "\n".join(warnings(rows, drops_identical=True))


def test_error_of_nll_per_token_follows_that_of_the_sequence():
    row = evaluation_row(evaluation(0.5, 0.5, 0.5, nll=0.2))  # 2.0 nats a sequence, error 0.1: 5 %
    assert row["nll_se"] == pytest.approx(0.2 * 0.05)


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
