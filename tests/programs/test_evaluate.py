"""Evaluations by models and against other models; results that are not computed twice; several processes; `spin eval`."""

from __future__ import annotations

import json
import sys

import pytest

from spin import cli
from spin.alignment.core.parquet import read_rows
from tests.helpers import flipped, run_command, run_main, save_tiny_model
from tests.helpers.runs import tiny_run, write_config, write_sums
from tests.helpers.scoring import save_decoder, save_encoder

SAMPLED = ("--max_new_tokens", 4, "--temperatures", 1, 0, "--num_samples", 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data, and a reward and a preference model."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_sums(folder / "data", num_test=5)
    save_decoder(folder / "reward")
    save_encoder(folder / "preference")
    return folder


def evaluate(root, model, name, *flags, code=0):
    output = root / name / "eval.json"
    base = ("eval", "--model", model, "--input_dir", root / "data", "--output_file", output)
    found, out, err = run_main(cli.main, *base, *flags)
    assert found == code, err
    return (json.loads(output.read_text()), out) if code == 0 else err


@pytest.fixture(scope="module")
def start(root, tiny_model):
    reward = ("--metric", "reward_model", "--scorer_model", root / "reward")
    return evaluate(root, tiny_model, "sft", *SAMPLED, *reward)[0]


def test_a_reward_model_is_a_metric_and_the_mean_is_over_prompts(root, start):
    rows = [row for row in read_rows(root / "sft" / "eval.parquet") if row["temperature"] == 1.0]
    assert [row["sample_index"] for row in rows] == [0] * 5 + [1] * 5
    assert start["temperatures"]["1"]["exact"] == pytest.approx(sum(row["score"] for row in rows) / 10)
    assert len({row["score"] for row in rows}) > 5 and start["temperatures"]["0"]["exact"] != 0
    # The scores are no right or wrong answers, and greedy responses are not drawn twice.
    assert not any("@" in key for scores in start["temperatures"].values() for key in scores)
    assert sum(row["temperature"] == 0.0 for row in read_rows(root / "sft" / "eval.parquet")) == 5


def test_responses_are_compared_with_those_of_another_model(root, start, tmp_path_factory):
    other = save_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=7)
    by = ("--win_rate_by", "preference_model", "--scorer_model", root / "preference")
    against = ("--against", root / "sft" / "eval.json")
    found, out = evaluate(root, other, "iter0", *SAMPLED, *by, *against)
    rate = found["win_rates"]["sft"]
    wins = {}
    for row in read_rows(root / "iter0" / "eval.parquet"):
        if row["temperature"] == 1.0:  # the first of the temperatures
            assert [win["against"] for win in row["wins"]] == ["sft"]
            wins.setdefault(row["prompt_id"], []).append(row["wins"][0]["value"])
        else:
            assert row["wins"] is None
    means = [sum(some) / len(some) for some in wins.values()]
    assert rate["win_rate"] == pytest.approx(sum(means) / 5) and rate["prompts"] == 5
    assert (rate["by"], rate["temperature"]) == ("preference_model", "1") and 0 < rate["lc_win_rate"] < 1
    assert rate["wins"] == sum(value > 0.5 for value in means) and "wins against sft" in out
    # The other way round, it is one minus that: both orders of every pair are asked.
    back = evaluate(root, start["model"], "back", *SAMPLED, *by, "--against", root / "iter0" / "eval.json")[0]
    assert back["win_rates"]["iter0"]["win_rate"] == pytest.approx(1 - rate["win_rate"])
    assert back["win_rates"]["iter0"]["lc_win_rate"] == pytest.approx(1 - rate["lc_win_rate"])


def test_a_preference_model_as_metric_compares_with_the_ground_truth(root, tiny_model):
    by = ("--metric", "preference_model", "--scorer_model", root / "preference")
    found, _ = evaluate(root, tiny_model, "preferred", "--max_new_tokens", 4, "--temperatures", 0, *by)
    rows = list(read_rows(root / "preferred" / "eval.parquet"))
    assert all(0 <= row["score"] <= 1 for row in rows) and len({row["score"] for row in rows}) > 1
    # A response that equals the ground truth neither wins nor loses.
    from spin.alignment.evaluation.responses import score_groups
    from spin.alignment.rewards import PromptGroup, ScorerSettings, make_scorer

    scorer = make_scorer(ScorerSettings("preference_model", model=str(root / "preference"), score_reference=True))
    turns = [{"role": "user", "content": "1+1"}]
    groups = [
        PromptGroup("p", turns, ["2"], "2"),
        PromptGroup("p", turns, ["two"], "2"),
        PromptGroup("p", turns, ["2"], "two"),
    ]
    (same, *_), (one, *_), (other, *_) = score_groups(scorer, groups)
    assert same == 0.5 and one == pytest.approx(1 - other) and found["n"] == 5


def test_nothing_is_evaluated_twice(root, tiny_model):
    flags = ("--max_new_tokens", 4, "--temperatures", 0, "--cache_dir", root / "cache")
    first, out = evaluate(root, tiny_model, "once", *flags)
    assert "already complete" not in out
    stamp = (root / "once" / "eval.json").stat().st_mtime_ns
    # Neither the batch size nor the place of the output matters, a longer response does.
    again, out = evaluate(root, tiny_model, "once", *flags, "--batch_size", 2)
    assert "already complete" in out and again == first and (root / "once" / "eval.json").stat().st_mtime_ns == stamp
    copied, out = evaluate(root, tiny_model, "elsewhere", *flags)
    assert "already complete" in out and copied == first
    assert (root / "elsewhere" / "eval.parquet").read_bytes() == (root / "once" / "eval.parquet").read_bytes()
    assert "already complete" not in evaluate(root, tiny_model, "once", *flags, "--overwrite")[1]
    longer, out = evaluate(root, tiny_model, "once", "--max_new_tokens", 5, "--temperatures", 0)
    assert "already complete" not in out and longer["key"] != first["key"]
    # Responses that were changed are computed again.
    responses = root / "once" / "eval.parquet"
    responses.write_bytes(flipped(responses.read_bytes(), 40))
    assert "already complete" not in evaluate(root, tiny_model, "once", "--max_new_tokens", 5, "--temperatures", 0)[1]


def test_two_processes_give_the_results_of_one(root, tiny_model):
    flags = ["--max_new_tokens", "4", "--temperatures", "1", "--num_samples", "3"]
    alone, _ = evaluate(root, tiny_model, "alone", *flags)
    output = root / "two" / "eval.json"
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port=0"]
    command += ["spin/evaluate_model.py", "--model", str(tiny_model), "--input_dir", str(root / "data")]
    done = run_command([*command, "--output_file", str(output), *flags])
    assert done.returncode == 0, done.stderr
    together = json.loads(output.read_text())
    assert together["temperatures"] == alone["temperatures"] and together["samples"] == alone["samples"]
    assert together["nll"] == pytest.approx(alone["nll"], rel=1e-5) and together["n"] == 5
    assert len(done.stdout.splitlines()) == 1  # only the main process speaks


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--metric", "judge"), "needs a running server"),
        (("--metric", "reward_model"), "needs a model"),
        (("--metric", "reward_model", "--win_rate_by", "judge", "--base_url", "http://x/v1"), "evaluate twice"),
        (("--scorer_model", "m"), "does not read scorer_model"),
        (("--num_samples", 2, "--temperatures", 0), "temperature 0 gives the same response"),
        (("--backend", "openai"), "require each other"),
        (("--against", "{root}/sft/eval.json"), "was scored by reward_model, not by exact_match"),
        (("--against", "{root}/sft/eval.json", "{root}/x/../sft/eval.json"), "two evaluations in folders called sft"),
        (("--against", "{root}/nowhere/eval.json"), "nowhere"),
        (("--against", "{root}/sft/eval.json", "--temperatures", 0.7), "no response at temperature 0.7"),
    ],
)
def test_bad_input_before_a_model_is_loaded(root, start, tiny_model, flags, sentence):
    (root / "x").mkdir(exist_ok=True)
    given = [str(flag).replace("{root}", str(root)) for flag in flags]
    assert sentence in evaluate(root, tiny_model, "bad", "--max_new_tokens", 4, *given, code=2)
    assert not (root / "bad").exists()


def test_a_run_compares_its_iterations_by_a_scorer(tmp_path, root):
    evaluation = {"max_new_tokens": 4, "limit": 4, "temperatures": [1.0]}
    evaluation |= {"win_rate_by": "preference_model", "scorer_model": str(root / "preference")}
    training = {"max_steps": 1, "use_cpu": True, "learning_rate": 1e-2}
    values = tiny_run(tmp_path, evaluate=evaluation, train=training, overrides=None)
    code, out, err = run_main(cli.main, "run", write_config(tmp_path / "run.yaml", values))
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    sft, first, second = summary["rows"]
    assert (
        "win_rates" not in sft and list(first["win_rates"]) == ["sft"] and list(second["win_rates"]) == ["sft", "iter0"]
    )
    assert second["win_rate"] == second["win_rates"]["sft"]["win_rate"] and "win_rate_interval" in second
    assert any(line.startswith("iter1 against iter0: wins ") for line in summary["verdicts"])
    assert "it wins" in summary["headline"]["sentence"] and "LC wins" in (tmp_path / "run" / "report.md").read_text()
    code, out, _ = run_main(cli.main, "run", tmp_path / "run.yaml")
    assert code == 0 and out.count("already complete") == 9


def test_a_server_answers_without_log_likelihoods(root, tiny_model, server):
    server.models = {"data": [{"id": "tiny"}]}
    flags = ("--backend", "openai", "--server_url", server.url, "--max_new_tokens", 4, "--temperatures", 0, 1)
    found, _ = evaluate(root, tiny_model, "served", *flags, "--num_samples", 2)
    rows = list(read_rows(root / "served" / "eval.parquet"))
    assert len(rows) == 15 == len(server.bodies) and all(row["nats"] is None for row in rows)
    assert "nll" not in found and found["skipped"] == [] and found["weights_hash"] == ""


def test_a_run_does_not_score_its_models_on_one_server(tmp_path):
    values = tiny_run(tmp_path, evaluate={"backend": "openai", "server_url": "http://localhost:1/v1"})
    code, _, err = run_main(cli.main, "run", write_config(tmp_path / "run.yaml", values))
    assert code == 2 and "whose server has one model, but a run evaluates several" in err
