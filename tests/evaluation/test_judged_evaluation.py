"""`spin eval` with a judge on a server: as the metric, and to compare with another model."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.evaluation.responses import read_responses
from tests.helpers import run_main, save_tiny_model
from tests.helpers.judging import judging_server, shown
from tests.helpers.runs import write_sums


@pytest.fixture
def judge():
    with judging_server() as fake:
        yield fake


def evaluate(folder, model, *flags, code=0):
    """Run `spin eval`; return eval.json and the stored responses, or what it said if it fails."""
    output = folder / model.name / "eval.json"
    base = (
        "--model",
        model,
        "--input_dir",
        write_sums(folder / "data"),
        "--output_file",
        output,
        "--max_new_tokens",
        6,
    )
    found, _, err = run_main(cli.main, "eval", *base, *flags)
    assert found == code, err
    return err if code else (json.loads(output.read_text()), read_responses(output.with_suffix(".parquet")))


def longer(own: str, other: str) -> float:
    return 0.5 + 0.5 * ((len(own) > len(other)) - (len(own) < len(other)))


def test_a_judge_is_the_metric(judge, tiny_model, tmp_path):
    result, stored = evaluate(
        tmp_path, tiny_model, "--metric", "judge", "--base_url", judge.url, "--temperatures", 0, 1, "--num_samples", 2
    )
    assert result["metric"] == "judge" and result["skipped"] == []
    for temperature, samples in (("0", 1), ("1", 2)):
        rows = [row for name in stored.by_prompt for row in stored.all_of(temperature, name)]
        assert len(rows) == 8 * samples
        # The probability to beat the ground truth, which is in no other place of the question.
        assert [row["score"] for row in rows] == [longer(row["response"].strip(), row["ground_truth"]) for row in rows]
        mean = sum(row["score"] for row in rows) / len(rows)
        assert result["temperatures"][temperature]["exact"] == pytest.approx(mean)
    assert all({*shown(body)} & {str(number + 1) for number in range(100, 108)} for body in judge.bodies)


def test_a_judge_compares_with_another_model(judge, tiny_model, tmp_path):
    other = save_tiny_model(tmp_path / "models" / "other", seed=5)
    flags = ("--metric", "exact_match", "--temperatures", 1)
    _, theirs = evaluate(tmp_path, other, *flags)
    against = ("--against", tmp_path / "other" / "eval.json", "--win_rate_by", "judge", "--base_url", judge.url)
    result, own = evaluate(tmp_path, tiny_model, *flags, *against)
    wins = [
        longer(row["response"].strip(), theirs.by_temperature["1"][name]["response"].strip())
        for name, row in own.by_temperature["1"].items()
    ]
    (found,) = result["win_rates"].values()
    assert found["by"] == "judge" and found["prompts"] == 8 and found["win_rate"] == pytest.approx(sum(wins) / 8)
    assert found["tie_rate"] == wins.count(0.5) / 8 and 0 < found["win_rate"] < 1
    assert result["metric"] == "exact_match" and judge.bodies


def test_a_baseline_that_does_not_exist_is_named(tiny_model, tmp_path):
    flags = ("--metric", "exact_match", "--win_rate_by", "exact_match", "--against", tmp_path / "no" / "eval.json")
    assert "no/eval.json, which does not exist: give the eval.json" in evaluate(tmp_path, tiny_model, *flags, code=2)


def test_a_judge_without_a_verdict_is_counted(judge, tiny_model, tmp_path):
    said = judge.say
    judge.say = lambda body: "I cannot say" if "[Response A]\n101\n" in body["messages"][0]["content"] else said(body)
    result, stored = evaluate(tmp_path, tiny_model, "--metric", "judge", "--base_url", judge.url, "--temperatures", 0)
    assert all(row["score"] is not None for row in stored.by_prompt.values())  # the other order decides
    judge.say = lambda body: "I cannot say" if "\n101\n" in body["messages"][0]["content"] else said(body)
    flags = ("--metric", "judge", "--base_url", judge.url, "--temperatures", 0, "--overwrite")
    result, stored = evaluate(tmp_path, tiny_model, *flags)
    (skipped,) = result["skipped"]
    assert stored.by_prompt[skipped["prompt_id"]]["ground_truth"] == "101" and result["temperatures"]["0"]["exact"] > 0
    judge.say = lambda body: "I cannot say"
    assert "failed on every response" in evaluate(tmp_path, tiny_model, *flags, code=2)
