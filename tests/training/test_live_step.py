"""The report of a running training: what it says, who reads it, and that a complete training has none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from spin.alignment.core.machine import process_record
from spin.alignment.pipeline.stages.training import training_progress
from spin.alignment.training import step_reports
from spin.alignment.training.live_step import (
    PROGRESS_FILE,
    LiveStep,
    read_live_step,
    remove_live_step,
    write_live_step,
)
from spin.alignment.training.step_reports import StepReports

LIVE = LiveStep(120, 500, loss=0.41234, margin=1.234, tokens_per_second=3410.2, seconds_left=250, memory={"host": 4.06})


def test_it_is_read_as_it_was_written_and_says_what_a_person_asks(tmp_path):
    write_live_step(tmp_path, LIVE)
    read = read_live_step(tmp_path)
    assert read.describe() == LIVE.describe() == "step 120 of 500, loss 0.4123, margin 1.23, 3,410 tokens/s, 4.1 GiB"
    assert training_progress(tmp_path).endswith("4.1 GiB, 4 min 10 s left") and not read.has_ended
    assert LiveStep(0, 5, memory={"host": 9.0, "gpu": 61.2}).describe() == "step 0 of 5, 61.2 GiB"


def test_the_report_of_a_process_that_has_ended_is_not_taken_for_a_running_one(tmp_path):
    write_live_step(tmp_path, LIVE)
    content = json.loads((tmp_path / PROGRESS_FILE).read_text())
    content["process"] = {**process_record(), "start": "an earlier process"}
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(content))
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-90").mkdir()
    assert read_live_step(tmp_path).has_ended
    assert training_progress(tmp_path) == "ended at step 120 of 500, checkpoint at step 100"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": 1, "steps": NaN, "process": {"pid": 1}}', '{"step": "x"}']
)
def test_a_damaged_report_is_none(tmp_path, content):
    (tmp_path / PROGRESS_FILE).write_text(content)
    assert read_live_step(tmp_path) is None


def test_a_report_that_cannot_be_written_is_left_out_and_leftovers_go_with_it(tmp_path):
    write_live_step(tmp_path / "absent", LIVE)
    assert not (tmp_path / "absent").exists()
    write_live_step(tmp_path, LIVE)
    (tmp_path / f".{PROGRESS_FILE}.1-abcdef01.tmp").touch()
    remove_live_step(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_speed_and_time_left_leave_out_the_first_step(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(step_reports.time, "monotonic", lambda: clock[0])
    trainer = SimpleNamespace(sums={"tokens": 0})
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    reports = StepReports(trainer, tmp_path)
    reports.on_train_begin(None, state, None)
    assert read_live_step(tmp_path).step == 0

    def step(seconds: float) -> LiveStep:
        clock[0] += seconds
        state.global_step += 1
        trainer.sums["tokens"] += 50
        reports.on_step_end(None, state, None)
        return read_live_step(tmp_path)

    assert step(60.0).seconds_left == 9 * 60  # nothing else is known yet
    reports.on_log(None, state, None, {"loss": 0.5, "rewards/margins": 0.25})
    live = step(2.0)
    assert (live.step, live.seconds_left, live.tokens_per_second) == (2, 8 * 2.0, 25.0)
    assert (live.loss, live.margin) == (0.5, 0.25)
    assert step(0.5).step == 2  # at most one report a second
    state.is_world_process_zero = False
    assert step(5.0).step == 2
