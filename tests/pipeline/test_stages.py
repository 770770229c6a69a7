"""Kinds of stages: what they record, and a kind of one's own, added from a file outside of the package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline import stages
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.processes import python_command
from spin.alignment.pipeline.stages import KINDS, Source, Stage, StageKind, make_stages, models_of
from tests.helpers import run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

FAST = {"max_steps": 1, "use_cpu": True}
ONLINE = {"iterations": None, "generate": None, "train": None, "overrides": None}
REVERSE = {
    "weighting": "reverse_dpo",
    "transform": "exponential",
    "transform_params": {"mu": 0.5},
    "train": {"max_steps": 3},
}
REWARDED = {"pairing": "best_vs_worst", "scorer": "reward_model", "scorer_model": "rewards/model"}
RUNS = {
    "plain": {},
    "start, control and held-out pairs": {"sft": FAST, "control": FAST, "launch": {"parallel": True}},
    "reverse DPO": {"weigh": REVERSE, "train": {**TRAINING, "alpha": 0.5}},
    "teacher": {"weigh": {"weighting": "teacher", "model_plus": "big"}, "iterations": 1, "overrides": None},
    "drift, two processes": {"weigh": {"weighting": "drift"}, "launch": {"num_processes": 2}},
    "scored pairs": {"iterations": 1, "overrides": None, "convert": REWARDED},
    "online": {
        **ONLINE,
        "online": {"scorer": "length_penalty", "eval_strategy": "steps", "use_cpu": True, "max_steps": 2},
        "control": FAST,
    },
}


def make_config(tmp_path, **changes):
    return load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes)))


def recorded(config, root: Path) -> dict[str, dict[str, object]]:
    """What the manifest will say each stage was made from, with contents as HASH and places under ROOT."""
    manifest, found = RunManifest(config.run_dir), {}
    for stage in make_stages(config):
        inputs = stage.inputs(manifest).items()
        values = {key: "HASH" if key.startswith("content of") and value != "Hub" else value for key, value in inputs}
        found[stage.name] = json.loads(json.dumps(values).replace(str(root), "ROOT"))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_of_an_earlier_version_is_still_done(tmp_path, name):
    """The names and recorded inputs of version 0.1.0: one that changed would make a finished run start over."""
    expected = json.loads((Path(__file__).parent / "recorded_inputs.json").read_text())[name]
    changes = dict(RUNS[name])
    if "held-out pairs" in name:
        data = str(tmp_path / "data")
        changes["data"] = {"train": data, "test": data, "test_pairs": True}
    assert recorded(make_config(tmp_path, **changes), tmp_path) == expected


def test_a_stage_comes_after_what_it_needs(tmp_path):
    for changes in RUNS.values():
        names = [stage.name for stage in make_stages(make_config(tmp_path, **changes))]
        for stage in make_stages(make_config(tmp_path, **changes)):
            before = names[: names.index(stage.name)]
            assert all(need in before for need in stage.needs if need in names), stage.name
        assert len(set(names)) == len(names)


def test_what_runs_beside_self_play_waits_for_the_model_that_it_needs(tmp_path):
    config = make_config(tmp_path, sft=FAST, control=FAST, weigh=REVERSE)
    beside = {stage.name: stage.needs for stage in make_stages(config) if stage.kind.can_run_beside}
    assert beside == {
        "sft/evaluate": ("sft/train",),
        "control/train": ("sft/train",),
        "control/evaluate": ("control/train",),
        **{f"iter{t}/forward/evaluate": (f"iter{t}/forward",) for t in (0, 1)},
        **{f"iter{t}/evaluate": (f"iter{t}/train",) for t in (0, 1)},
    }


def test_models_of_a_run_and_what_the_report_takes_them_for(tmp_path):
    config = make_config(tmp_path, control=FAST, weigh=REVERSE, iterations=1, overrides=None)
    models = [(model.name, model.role, model.is_reported) for model in models_of(make_stages(config))]
    assert models == [
        ("sft", "start", True),
        ("sft_continued", "control", True),
        ("iter0_spin", "unweighted", True),
        ("iter0_reverse", "scorer", False),
        ("iter0", "policy", True),
    ]


def test_the_plan_does_not_read_the_data(tmp_path):
    """`spin report` of a run whose data are elsewhere by now."""
    config = make_config(tmp_path)
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path / "moved")))
    assert [stage.name for stage in make_stages(missing)] == [stage.name for stage in make_stages(config)]


# --- a kind of one's own ------------------------------------------------------------------------------------------------

COUNT = """import json, sys
from pathlib import Path
import pyarrow.parquet as parquet

folder, output = map(Path, sys.argv[1:])
rows = sum(parquet.read_table(path).num_rows for path in folder.glob("*.parquet"))
output.parent.mkdir(parents=True, exist_ok=True)
output.write_text(json.dumps({"rows": rows}))
"""


class CountPairs(StageKind):
    """``iterT/count``: how many pairs an iteration trains on."""

    result_suffix = ".json"

    def __init__(self, program: Path, expected: int) -> None:
        self.path, self.expected = program, expected

    def in_iteration(self, config, iteration):
        pairs, output = config.iteration_dir(iteration) / "pairs", config.iteration_dir(iteration) / "counts" / "n.json"
        return [
            Stage(
                kind=self,
                name=f"iter{iteration}/count",
                configs=[{"pairs": str(pairs), "output": str(output)}],
                settings={"expected": self.expected},
                sources=[Source(str(pairs), lambda: sorted(pairs.glob("*.parquet")))],
                outputs=lambda: [output],
                folder=output.parent,
                iteration=iteration,
                needs=(f"iter{iteration}/convert",),
            )
        ]

    def command(self, stage, config):
        return python_command(self.path, [config["pairs"], config["output"]])

    def check_settings(self, config, source):
        if self.expected < 1:
            raise InputError(f"{source} expects {self.expected} pairs: set it to 1 or more")

    def finish(self, stage, config):
        found = json.loads(stage.outputs()[0].read_text())["rows"]
        if found != self.expected:
            raise InputError(f"{stage.name} counted {found} pairs, not {self.expected}: generate again")

    def progress(self, stage):
        return "still counting"

    def problems(self, stage, config):
        return [f"{stage.name} has been looked at"]


@pytest.fixture
def with_counting(tmp_path, monkeypatch):
    """Returns a function that registers the kind, between conversion and training, in a run without training."""
    (tmp_path / "count.py").write_text(COUNT)

    def register(expected: int) -> Path:
        kinds = {name: KINDS[name] for name in ("generate", "convert")}
        monkeypatch.setattr(stages, "KINDS", {**kinds, "count": CountPairs(tmp_path / "count.py", expected)})
        return write_config(tmp_path / "config.yaml", tiny_run(tmp_path, iterations=1, overrides={}))

    return register


@pytest.mark.slow
def test_a_kind_from_another_file_runs_in_a_run(tmp_path, with_counting):
    path, run_dir = with_counting(expected=24), tmp_path / "run"
    code, out, err = run_main(cli.main, "run", path)
    # No stage of this run makes a model, so all stages are done and there is nothing to report.
    assert code == 2 and "no results yet" in err, out + err
    assert "==> iter0/count: starting" in out and "==> iter0/count: done in" in out
    manifest = RunManifest(run_dir)
    assert [name for name in manifest.stages if manifest.is_done(name)] == [
        "iter0/generate",
        "iter0/convert",
        "iter0/count",
    ]
    assert manifest.stages["iter0/count"].inputs["expected"] == 24
    assert json.loads((run_dir / "iter0" / "counts" / "n.json").read_text()) == {"rows": 24}
    assert "iter0/count: done already" in run_main(cli.main, "run", path)[1]
    code, out, _ = run_main(cli.main, "validate", run_dir)
    assert code == 2 and "iter0/count has been looked at" in out

    with_counting(expected=23)
    code, _, err = run_main(cli.main, "run", path)
    assert code == 2 and "iter0/count: expected: 24 -> 23" in err
    code, out, err = run_main(cli.main, "run", path, "--rerun_changed")
    assert code == 2 and "iter0/count counted 24 pairs, not 23" in err
    assert RunManifest(run_dir).stages["iter0/count"].state == "failed"
    code, out, _ = run_main(cli.main, "status", run_dir)
    assert code == 0 and "still counting" in out


def test_settings_of_such_a_kind_are_checked_before_anything_starts(tmp_path, with_counting):
    code, _, err = run_main(cli.main, "run", with_counting(expected=0))
    assert code == 2 and "expects 0 pairs" in err and not (tmp_path / "run").exists()
