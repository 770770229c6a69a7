"""The stop rule: which sequences of comparisons end a run, and that a run ends, says why, and goes on only if told."""

from __future__ import annotations

import json

import pytest

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.run_sections import StopConfig
from spin.alignment.pipeline.stop_rule import Change, decide, stop_of
from tests.helpers import run_main
from tests.helpers.evaluations import share, write_evaluation
from tests.helpers.runs import tiny_run, write_config

MODELS = ["sft", "iter0", "iter1", "iter2"]


def by_signs(*signs):
    """A comparison of each iteration with any model before it, and the pairs that were compared."""
    asked = []

    def compare(one, other):
        asked.append((one, other))
        return Change(signs[int(one[4:])], "x")

    return compare, asked


@pytest.mark.parametrize(
    ("when", "patience", "signs", "iteration", "best"),
    [
        ("no_improvement", 1, (1, 1, 1), None, None),
        ("no_improvement", 1, (1, 0, 1), 1, "iter0"),
        ("no_improvement", 1, (0, 1, 1), 0, "sft"),
        ("no_improvement", 2, (0, 1, 0), None, None),
        ("no_improvement", 2, (1, 0, -1), 2, "iter0"),
        ("worse", 1, (0, 0, 0), None, None),
        ("worse", 1, (1, 0, -1), 2, "iter0"),
        ("worse", 2, (-1, -1, 1), 1, "sft"),
    ],
)
def test_when_a_run_stops(when, patience, signs, iteration, best):
    found = decide(StopConfig(when=when, patience=patience), MODELS, by_signs(*signs)[0])
    assert (found and (found.iteration, found.best)) == (None if iteration is None else (iteration, best))


def test_iterations_are_compared_with_the_best_so_far_and_win_rates_with_the_neighbour():
    compare, asked = by_signs(1, 0, 0)
    found = decide(StopConfig(when="no_improvement", patience=2), MODELS, compare)
    assert asked == [("iter0", "sft"), ("iter1", "iter0"), ("iter2", "iter0")] and found.best == "iter0"
    assert found.reason == "iter2 is not clearly better than iter0 (x), the 2 iterations since iter0 all failing"
    compare, asked = by_signs(1, 0, 0)
    decide(StopConfig(when="no_improvement", patience=2, measure="win_rate"), MODELS, compare)
    assert asked[-1] == ("iter2", "iter1")


def write_scores(run_dir, *rights):
    for name, right in zip(MODELS, rights, strict=False):
        write_evaluation(run_dir / name, {1.0: share(100, right)}, [1.0] * 100, [4] * 100)


def test_stored_evaluations_decide(tmp_path):
    values = tiny_run(tmp_path, iterations=3, stop={"when": "no_improvement"})
    config = load_run_config(write_config(tmp_path / "run.yaml", values))
    write_scores(tmp_path / "run", 30, 50, 51)
    assert stop_of(config, 0) is None  # 20 wins and no loss
    found = stop_of(config, 1)
    assert found.iteration == 1 and found.best == "iter0"
    assert found.reason == "iter1 is not clearly better than iter0 (sampled_exact +0.010 ± 0.020)"
    assert stop_of(config, 2) is None  # the last iteration: there is nothing left to stop
    wanted = load_run_config(write_config(tmp_path / "run.yaml", values), ["--stop.measure=greedy_exact"])
    with pytest.raises(InputError, match="the evaluations of this run have sampled_exact, nll"):
        stop_of(wanted, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stop": {"when": "worse"}, "data": {"train": "x"}}, "there are no held-out prompts"),
        ({"stop": {"when": "worse", "measure": "win_rate"}}, "evaluate.win_rate_by is not set"),
        ({"stop": {"when": "soon"}}, "choose one of never, no_improvement, worse"),
        ({"stop": {"when": "worse", "patience": 0}}, "patience"),
    ],
)
def test_bad_rules(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        load_run_config(write_config(tmp_path / "run.yaml", tiny_run(tmp_path, **changes)))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_stops_says_why_and_goes_on_only_if_told(tmp_path, parallel):
    changes = {"stop": {"when": "no_improvement"}, "launch": {"parallel": parallel}, "overrides": None}
    config = write_config(tmp_path / "run.yaml", tiny_run(tmp_path, **changes, train={"max_steps": 1, "use_cpu": True}))
    run_dir = tmp_path / "run"
    for _ in range(1 if parallel else 2):  # the second start finds everything done, and stays stopped
        code, out, err = run_main(cli.main, "run", config)
        assert code == 0, err
        assert "the run stops after iteration 0: iter0 is not clearly better than sft" in out
        assert not (run_dir / "iter1").exists()
        stopped = RunManifest(run_dir).stopped
        assert (stopped["iteration"], stopped["best"]) == (0, "sft")
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["stopped"] == stopped and summary["headline"]["advice"].startswith(
            "The run stopped after iteration 0"
        )
        assert "The run stopped after iteration 0" in (run_dir / "report.md").read_text()
    if parallel:
        return
    _, out, _ = run_main(cli.main, "status", run_dir)
    assert (
        "stopped after iteration 0: iter0 is not clearly better" in out
        and run_main(cli.main, "validate", run_dir)[0] == 0
    )
    code, out, err = run_main(cli.main, "run", config, "--stop.when=never")
    assert code == 0 and (run_dir / "iter1" / "eval.json").is_file() and RunManifest(run_dir).stopped is None, err
