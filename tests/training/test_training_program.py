"""The one way through a training: what a program is asked for, in which order, and what happens when it fails."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from spin.alignment.core.checked_json import read_checked_json
from spin.alignment.training import run
from spin.alignment.training.described import Described
from spin.alignment.training.program import TrainingData, TrainingJob, TrainingProgram


class Recorded(TrainingProgram):
    """A program that records the calls; its trainer takes no step."""

    arguments_class = SimpleNamespace

    def __init__(self) -> None:
        self.calls: list[str] = []

    def load_data(self, settings, encoder):
        return TrainingData({"train": [1, 2, 3]}, {})

    def describe_data(self, data):
        return []

    def describe(self, settings):
        return Described("Recorded", (), (), ())

    def data_key(self, job):
        return "data"

    def inputs(self, job):
        return {"model": job.model_key, "data": self.data_key(job)}

    def open(self, settings):
        self.calls.append("open")

    def make_trainer(self, job, model):
        self.calls.append("make_trainer")
        return SimpleNamespace(
            train=lambda resume_from_checkpoint: SimpleNamespace(),
            mean_loss=lambda: 0.5,
            eval_dataset=None,
            accelerator=SimpleNamespace(
                is_main_process=True, wait_for_everyone=lambda: None, end_training=lambda: self.calls.append("end")
            ),
            add_callback=lambda callback: None,
            args=SimpleNamespace(load_best_model_at_end=False),
            state=SimpleNamespace(global_step=7, log_history=[{"loss": 0.25}]),
        )

    def metrics(self, job, trainer, result):
        return {"rows": job.data.sizes()}

    def close(self):
        self.calls.append("close")


@pytest.fixture
def job(tmp_path):
    arguments = SimpleNamespace(process_index=0, save_only_model=False, deepspeed_plugin=None, report_to=[])
    output = SimpleNamespace(resume_from_checkpoint=None)
    settings = SimpleNamespace(
        output_dir=tmp_path / "out", output=output, overwrite=False, arguments=arguments, push=False
    )
    return TrainingJob(settings, None, TrainingData({"train": [1, 2, 3]}, {}), "weights")


def save(trainer, settings):
    (settings.output_dir / "config.json").write_text("{}")
    (settings.output_dir / "model.safetensors").touch()
    return {"save_dtype": "float32"}


def test_a_finished_training_is_left_alone_and_its_metrics_are_those_of_the_program(job, monkeypatch, capsys):
    program = Recorded()
    monkeypatch.setattr(run, "load_policy", lambda settings: program.calls.append("load_policy"))
    monkeypatch.setattr(run, "save_policy", save)
    monkeypatch.setattr(run, "write_model_card", lambda program, job, metrics: program.calls.append("card"))
    run.run_job(program, job)
    assert program.calls == ["open", "load_policy", "make_trainer", "card", "end", "close"]
    written = json.loads((job.settings.output_dir / "metrics.json").read_text())
    assert (written["steps"], written["train_loss"], written["rows"]) == (7, 0.5, {"train": 3})
    assert written["save_dtype"] == "float32"
    assert read_checked_json(job.settings.output_dir / "inputs.json", "") == {"model": "weights", "data": "data"}
    program.calls.clear()
    run.run_job(program, job)
    assert program.calls == [] and "is already complete" in capsys.readouterr().out


def test_what_a_program_acquired_is_freed_when_the_policy_cannot_be_loaded(job, monkeypatch):
    def fail(settings):
        raise OSError("no such weights")

    program = Recorded()
    monkeypatch.setattr(run, "load_policy", fail)
    with pytest.raises(OSError, match="no such weights"):
        run.run_job(program, job)
    assert program.calls == ["open", "close"]
    assert not (job.settings.output_dir / "metrics.json").exists()
