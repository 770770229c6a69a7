"""A run on prompts without ground truth: online training, rejection sampling as its control, scores by group of rows."""

from __future__ import annotations

import json

import pytest

from spin import cli, evaluate_model
from spin.alignment.core.parquet import read_rows
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.stages import make_stages
from tests.helpers import run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

SCORER = "tests.helpers.online:share_of_letters"
NONE = {"iterations": None, "generate": None, "train": None, "overrides": None}
ONLINE = {**TRAINING, "max_steps": 2, "num_samples": 2, "max_new_tokens": 8, "scorer": SCORER, "save_steps": 2}


def write_prompts(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 12), ("test", 6)):
        rows = [
            {
                "prompt_id": f"{split}{number}",
                "prompt": f"say {number}",
                "group": "odd" if number % 2 else "even",
                **columns,
            }
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def values(tmp_path, **changes):
    data = str(write_prompts(tmp_path / "prompts"))
    return tiny_run(
        tmp_path,
        **NONE,
        **{
            "data": {"train": data, "test": data},
            "online": ONLINE,
            "select": {"scorer": SCORER, "threshold": 0.01, "generate": {"num_samples": 2, "max_new_tokens": 8}},
            "control": {**TRAINING, "max_steps": 2, "save_strategy": "no"},
            "evaluate": {"metric": SCORER, "group_by": "group", "max_new_tokens": 8, "temperatures": [0, 1]},
            **changes,
        },
    )


def stages_of(folder, prefix):
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return [stage for name, stage in stages.items() if name.startswith(prefix)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("rejection")
    # Most responses of a random model are truncated, and none of those is accepted: 24 tokens are enough for some to end.
    select = {"scorer": SCORER, "threshold": 0.01, "generate": {"num_samples": 4, "max_new_tokens": 24}}
    code, out, err = run_main(cli.main, "run", write_config(root / "config.yaml", values(root, select=select)))
    assert code == 0, err[-3000:]
    return root / "run", out


def test_the_control_is_trained_on_the_accepted_responses(run):
    folder, _ = run
    rows = list(read_rows(folder / "control" / "accepted" / "train.parquet"))
    counts = json.loads((folder / "control" / "accepted" / "train.counts.json").read_text())
    assert counts["responses"] == 12 * 4 and counts["accepted"] == len(rows) > 0
    metrics = json.loads((folder / "control" / "metrics.json").read_text())
    # A random model also writes control tokens, and training refuses those rows.
    assert metrics["rows"]["train"] + sum(metrics["dropped"].values()) == len(rows)
    assert [stage["state"] for stage in stages_of(folder, "control/")] == ["done"] * 4


def test_the_report_compares_with_start_and_control_in_every_group(run):
    folder, out = run
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["model"]: row for row in summary["rows"]}
    assert set(rows) == {"sft", "sft_continued", "online"}
    for row in rows.values():
        assert "nll" not in row and row["n"] == 6
        halves = [row["groups"][name] for name in ("even", "odd")]
        assert [half["n"] for half in halves] == [3, 3]
        mean = sum(half["greedy_exact"] for half in halves) / 2
        assert row["greedy_exact"] == pytest.approx(mean) and len(halves[0]["greedy_exact_interval"]) == 2
    keys = {
        "greedy_exact",
        "sampled_exact",
        "greedy_exact/odd",
        "sampled_exact/odd",
        "greedy_exact/even",
        "sampled_exact/even",
    }
    assert set(rows["online"]["against_start"]) == set(rows["online"]["against_control"]) == keys
    assert "against_start" not in rows["sft"] and "against_control" not in rows["sft_continued"]
    difference = rows["online"]["groups"]["odd"]["greedy_exact"] - rows["sft"]["groups"]["odd"]["greedy_exact"]
    assert rows["online"]["against_start"]["greedy_exact/odd"]["difference"] == pytest.approx(difference)
    assert any("share_of_letters on odd" in line for line in summary["verdicts"])
    assert "(ground truth:" not in out and "\nsay 0\n" in out
    page = (folder / "report.html").read_text()
    assert "<dt>ground truth</dt>" not in page and "score greedy" in page and "odd, greedy" in page


def test_a_finished_run_is_not_repeated(run):
    folder, _ = run
    code, _, err = run_main(cli.main, "run", folder.parent / "config.yaml")
    assert code == 0 and "starting" not in err, err


def test_the_order_of_the_stages(tmp_path):
    config = load_run_config(write_config(tmp_path / "config.yaml", values(tmp_path)))
    stages = {stage.name: stage for stage in make_stages(config)}
    names = list(stages)
    assert names.index("control/generate") < names.index("control/select") < names.index("control/train")
    assert stages["control/train"].needs == ("sft/train", "control/select")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"control": None}, "the section 'select' of"),
        ({"select": {"scorer": SCORER, "generate": 3}}, "select.generate is not a mapping"),
        (
            {"select": {"scorer": SCORER, "generate": {"seed": 3}}},
            "'seed' in select.generate is set by the pipeline itself",
        ),
        ({"select": {"scorer": SCORER, "generate": {"num_sample": 3}}}, "unknown key 'num_sample'"),
        ({"select": {"scorer": "nothing"}}, "unknown scorer 'nothing'"),
        ({"select": {"threshold": 1}}, "scorer"),
        ({"select": {"scorer": "math_answer"}}, "or keep prompts without an answer"),
        ({"select": {"scorer": "instructions"}}, "scorer instructions cannot score"),
        ({"online": {**ONLINE, "scorer": "instructions"}}, "has no such column"),
        ({"evaluate": {"metric": "instructions"}}, "no held-out row of"),
        ({"evaluate": {"metric": SCORER, "group_by": "topic"}}, "it has no column 'topic'"),
    ],
)
def test_what_is_refused_before_the_first_stage(tmp_path, changes, says):
    config = {key: value for key, value in values(tmp_path, **changes).items() if value is not None}
    code, _, err = run_main(cli.main, "run", write_config(tmp_path / "config.yaml", config))
    assert code == 2 and says in err, err
    assert not (tmp_path / "run" / "control").exists()


def test_an_evaluation_names_the_rows_that_the_metric_cannot_score(tiny_model, tmp_path):
    data = write_prompts(tmp_path / "prompts", instructions=[{"kind": "no_commas", "arguments": {}}])
    lines = (data / "test.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"prompt_id": "odd one", "prompt": "say", "instructions": [{"kind": "none"}]})
    (data / "test.jsonl").write_text("\n".join(lines))
    code, out, err = run_main(
        *(evaluate_model.main, "--model", tiny_model, "--input_dir", data, "--output_file", tmp_path / "eval.json"),
        *("--metric", "instructions", "--max_new_tokens", 4, "--temperatures", 0),
    )
    assert code == 0, err
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["n"] == 5 and [item["prompt_id"] for item in found["skipped"]] == ["odd one"]
    assert "unknown instruction 'none'" in found["skipped"][0]["reason"] and "NLL" not in out
