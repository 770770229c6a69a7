"""Trackers, each with its real package where that is installed: one axis, one run across a resume, each step once."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from spin import run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.stages.base import Model, StageKind
from spin.alignment.pipeline.tracked_run import RunTrackers, group_of, tracker_values
from spin.alignment.training import trackers
from spin.alignment.training.reporting import Reports, log_kind
from spin.alignment.training.step_reports import StepReports
from spin.alignment.training.trackers import TRACKERS, check_run_trackers
from spin.alignment.training.trackers.base import RECORD_FILE, markdown_table, read_record, tracked_key
from tests.helpers import run_main, save_tiny_model
from tests.helpers.trackers import INSTALLED, READERS
from tests.helpers.training import write_config, write_pairs


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.mark.parametrize("name", INSTALLED)
def test_a_training_that_was_interrupted_continues_its_run_and_logs_each_step_once(tmp_path, monkeypatch, name):
    save_tiny_model(tmp_path / "model")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dataset_splits": ["train_prefs"]}
    told = {"report_to": [name], "tracker_group": "g", "tracker_step": 100, "run_name": "iter1"}
    folder = str(tmp_path / "trackers")
    pairs = write_pairs(tmp_path / "pairs", 16)
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", pairs, **settings, **told, tracker_dir=folder)
    step_end = StepReports.on_step_end

    def interrupt(self, args, state, control, **others):
        if state.global_step == 4:
            raise KeyboardInterrupt
        step_end(self, args, state, control, **others)

    with monkeypatch.context() as patched:
        patched.setattr(StepReports, "on_step_end", interrupt)
        assert run_main(run_spin.main, config)[0] == 130
    key = read_record(tmp_path / "out")["key"]
    code, out, err = run_main(run_spin.main, config)
    assert code == 0 and "resuming from" in out, err
    assert read_record(tmp_path / "out")["key"] == key
    deadline = time.monotonic() + 20
    stored = READERS[name](tmp_path / "trackers")
    # On a busy machine, W&B's own process may still be writing.
    while len(stored["iter1"]["train/loss"]) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
        stored = READERS[name](tmp_path / "trackers")
    assert "iter1" in stored and stored.keys() <= {"iter1", "stages"}  # Trackio's database is that of the process
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    expected = [(100 + item["step"], pytest.approx(item["loss"])) for item in history if "loss" in item]
    assert sorted(stored["iter1"]["train/loss"]) == expected and len(expected) == 4


@pytest.mark.parametrize("name", INSTALLED)
def test_stages_are_reported_at_the_steps_of_their_model_and_continued(tmp_path, name):
    class Scored(StageKind):
        def numbers(self, stage, seconds):
            return {"exact": 0.25 + (stage.iteration or 0)}

        def examples(self, stage):
            return [{"prompt": "2+3 | x\ny?", "response": "5"}]

    run_dir = tmp_path / "run"
    for iteration in range(2):
        (run_dir / f"iter{iteration}").mkdir(parents=True)
        (run_dir / f"iter{iteration}" / "metrics.json").write_text('{"steps": 10}')
    config = SimpleNamespace(run_dir=str(run_dir), report_to=[name])

    def stage(model: str, role: str, iteration: int | None) -> SimpleNamespace:
        scored = Model(model, role, run_dir / model, iteration)
        return SimpleNamespace(name=f"{model}/evaluate", kind=Scored(), iteration=iteration, makes=None, scores=scored)

    for stages in ([stage("sft", "start", None), stage("iter0", "policy", 0)], [stage("iter1", "policy", 1)]):
        with RunTrackers(config) as opened:
            opened.open()
            for item in stages:
                opened.report(item, 3.0)
        time.sleep(1.1)  # wandb names the folder of an attempt after the second in which it starts
    stored = READERS[name](run_dir / "trackers")
    assert "stages" in stored and stored.keys() <= {"iter1", "stages"}
    assert sorted(stored["stages"]["evaluate/exact"]) == [(0, 0.25), (10, 0.25), (20, 1.25)]
    assert [value for _, value in stored["stages"]["evaluate/seconds"]] == [3.0, 3.0, 3.0]
    assert stored["stages"]["responses"]


def test_a_training_of_a_run_is_told_its_group_and_the_steps_before_it(tmp_path):
    for iteration, steps in enumerate((10, 7)):
        (tmp_path / f"iter{iteration}").mkdir()
        (tmp_path / f"iter{iteration}" / "metrics.json").write_text(json.dumps({"steps": steps}))
    config = SimpleNamespace(run_dir=str(tmp_path), report_to=["wandb"])
    told = tracker_values(config, Model("iter2", "policy", tmp_path / "iter2", 2), {})
    assert told == {
        "report_to": ["wandb"],
        "run_name": "iter2",
        "tracker_group": f"{tmp_path.name}-{tracked_key(tmp_path)[:6]}",
        "tracker_dir": str(tmp_path / "trackers"),
        "tracker_step": 17,
    }
    assert group_of(tmp_path) == told["tracker_group"]  # stored, so a resumed run has the same
    scorer = tracker_values(config, Model("x", "scorer", tmp_path / "iter0" / "forward", 0), {"report_to": "mlflow"})
    assert (scorer["run_name"], scorer["report_to"], scorer["tracker_step"]) == ("iter0-forward", "mlflow", 0)
    assert tracker_values(config, Model("sft", "start", tmp_path / "sft"), {"report_to": "none"}) == {}
    assert tracker_values(SimpleNamespace(run_dir=str(tmp_path), report_to=[]), Model("s", "start", tmp_path), {}) == {}


def test_an_unknown_or_absent_tracker_is_refused_with_the_command(monkeypatch):
    with pytest.raises(
        InputError, match=r"report_to' in c\.yaml names 'tensorbord': choose some of tensorboard, wandb"
    ):
        check_run_trackers(["tensorbord"], "c.yaml")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"mlflow, whose package is missing: pip install mlflow-skinny sqlalchemy alembic"
    ):
        check_run_trackers(["mlflow"], "c.yaml")


class Failing:
    """A callback of a tracker whose server is lost."""

    def on_train_begin(self, *_, **__):
        raise ConnectionError("no route to host")

    on_log = on_train_begin


def test_a_tracker_that_fails_at_the_start_is_refused_and_later_left_out(tmp_path, capsys):
    settings = SimpleNamespace(output_dir=tmp_path, output=SimpleNamespace(tracker_step=0))
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    reports = Reports({"wandb": Failing()}, settings)
    with pytest.raises(InputError, match=r"the tracker wandb cannot start \(no route to host\)"):
        reports.on_train_begin(None, state, None)
    reports.on_log(None, state, None, logs={"loss": 1.0})
    reports.on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().err.count("warning: the tracker wandb failed (no route to host)") == 1


def test_logs_of_one_step_are_told_apart_and_tables_keep_their_rows():
    kinds = [log_kind(logs) for logs in ({"loss": 1}, {"eval_loss": 1}, {"train_runtime": 1, "train_loss": 1})]
    assert kinds == ["train", "eval", "summary"]
    assert markdown_table(["a", "b"], [["1|2", "x\ny"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | x<br>y |"


def test_the_record_is_removed_with_the_training_that_it_belongs_to(tmp_path):
    from spin.alignment.training.output_dir import OutputFolder

    (tmp_path / RECORD_FILE).write_text("{}")
    settings = SimpleNamespace(
        output_dir=tmp_path,
        overwrite=True,
        output=SimpleNamespace(resume_from_checkpoint=None),
        arguments=SimpleNamespace(save_only_model=False),
    )
    OutputFolder(settings, {}).prepare(is_main=True)
    assert not (tmp_path / RECORD_FILE).exists()
    assert set(READERS) == set(TRACKERS)
