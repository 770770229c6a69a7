"""Held-out prompts during online training: callbacks are informed, every step is evaluated once, and bad rows are skipped."""

from __future__ import annotations

import json
import logging
import math

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.online.prompts import load_held_out
from spin.alignment.training.online.trainer import OnlineTrainer
from tests.helpers import char_tokenizer
from tests.helpers.online import online_values, share_of_letters


def letters_or_failure(prompt: str, response: str, reference: str) -> float:
    """A reward that fails on one held-out prompt."""
    if prompt == "held out 1":
        raise ZeroDivisionError("no letters")
    return share_of_letters(prompt, response, reference)


class Recorder(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, metrics, **_):
        self.seen.append((state.global_step, dict(metrics)))


@pytest.fixture
def make(tiny_model, tmp_path):
    def trainer(**changes):
        lines = [json.dumps({"prompt_id": f"h{number}", "prompt": f"held out {number}"}) for number in range(3)]
        (tmp_path / "test.jsonl").write_text("\n".join(lines))
        asked = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_prompts": str(tmp_path)}
        values = online_values(tmp_path, tiny_model, tmp_path, **asked | changes)
        for name in ("model_name_or_path", "dataset_mixer", "dataset_splits"):
            del values[name]
        prompts = Dataset.from_list([{"prompt": f"say {number}"} for number in range(12)])
        recorder = Recorder()
        made = OnlineTrainer(str(tiny_model), OnlineConfig(**values, report_to="none"), prompts, callbacks=[recorder])
        return made, recorder

    return trainer


def count_answers(trainer, monkeypatch):
    """Count the held-out prompts that are answered, by step and temperature."""
    asked, respond = [], trainer.sampler.respond

    def counting(requests, sampling):
        if sampling.num_samples == 1:
            asked.append((trainer.state.global_step, sampling.temperature, len(requests)))
        return respond(requests, sampling)

    monkeypatch.setattr(trainer.sampler, "respond", counting)
    return asked


def test_callbacks_are_informed_and_every_step_is_answered_once(make, monkeypatch):
    trainer, recorder = make(eval_temperatures=[0.0, 1.0])
    asked = count_answers(trainer, monkeypatch)
    trainer.train()
    assert [step for step, _ in recorder.seen] == [1, 2, 3]
    expected = [(step, temperature, 3) for step in (1, 2, 3) for temperature in (0.0, 1.0)]
    assert asked == expected
    last = trainer.evaluate()  # as the program does at the end: the same weights
    assert asked == expected and len(recorder.seen) == 3 and last == recorder.seen[-1][1]
    logged = [entry for entry in trainer.state.log_history if "eval_t1_score" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert logged[-1]["eval_t1_score"] == last["eval_t1_score"]


def test_a_callback_can_stop_the_training(make):
    trainer, recorder = make()
    recorder.on_evaluate = lambda args, state, control, metrics, **_: setattr(control, "should_training_stop", True)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_scorer_that_fails_on_a_held_out_prompt_does_not_end_the_training(make, caplog):
    trainer, recorder = make(
        scorer="tests.training.test_online_evaluation:letters_or_failure", eval_temperatures=[0.0, 1.0]
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    metrics = recorder.seen[0][1]
    assert metrics["eval_t1_failed_scores"] == 1 and 0 <= metrics["eval_t1_score"] <= 1
    assert metrics["eval_t1_length"] > 0
    assert any("is not scored: scorer" in line and "no letters" in line for line in caplog.messages)


def test_bad_held_out_rows_are_skipped_and_named(tmp_path, caplog):
    def row(name, text):
        return {"prompt_id": name, "prompt": text}

    lines = [
        row("good", "say 1"),
        row("long", "x" * 99),
        row("end", "a<|im_end|>b"),
        row("empty", ""),
        row("good", "2"),
    ]
    lines.append({"prompt_id": "unanswered question", "messages": [{"role": "user", "content": "say 2"}]})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"use_cpu": True, "report_to": "none", "max_length": 96, "max_prompt_length": 64, "max_new_tokens": 8}
    settings = OnlineConfig(**values, scorer="tests.helpers.online:share_of_letters", eval_prompts=str(tmp_path))
    encoder = ChatEncoder(char_tokenizer())
    with caplog.at_level(logging.WARNING):
        prompts, skipped = load_held_out(str(tmp_path), settings, encoder)
    assert [prompt.prompt_id for prompt in prompts.prompts] == ["good", "unanswered question"]
    assert sum(skipped.values()) == 4
    said = "\n".join(caplog.messages)
    for words in ("4 held-out rows skipped", "long: it has", "end: ", "control token", "empty: ", "of an earlier row"):
        assert words in said
    comparing = OnlineConfig(**values, scorer="exact_match", eval_prompts=str(tmp_path))
    with pytest.raises(InputError, match=r"no held-out row of .* can be used: "):
        load_held_out(str(tmp_path), comparing, encoder)


def test_the_start_is_answered_too_and_several_answers_give_pass_rates(make):
    trainer, recorder = make(
        eval_on_start=True, eval_temperatures=[0.0, 1.0], eval_samples=3, eval_pass_score=0.5, max_steps=1
    )
    trainer.train()
    assert [step for step, _ in recorder.seen] == [0, 1]
    for _, found in recorder.seen:
        rates = [found[f"eval_t1_pass_at_{k}"] for k in (1, 2, 3)]
        assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
        assert found["eval_t1_best_of_3"] >= found["eval_t1_score"] and "eval_t0_best_of_3" not in found


def test_a_training_logs_and_stores_what_its_steps_did(make, tmp_path):
    trainer, _ = make(updates_per_batch=2, ref_update_freq=-1, kept_prompts=2, kept_steps=2, eval_strategy="no")
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(steps) == 3
    assert all(0 < entry["entropy"] < math.log(200) and entry["staleness"] == 0.5 for entry in steps)
    # In the first step the reference is still the policy for the first of two updates; then the policy moves away from it.
    assert 0 <= steps[0]["kl"] < steps[2]["kl"]
    tables = sorted(path.name for path in (tmp_path / "out" / "responses").iterdir())
    assert tables == ["step-000002.parquet", "step-000003.parquet"]
    rows = pq.read_table(tmp_path / "out" / "responses" / tables[0]).to_pylist()
    assert len(rows) == 2 * 4 and len({row["prompt_id"] for row in rows}) == 2
    assert all(row["logp_per_token"] < 0 and row["score"] is not None for row in rows)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval_samples": 4, "eval_temperatures": [0.0]}, "temperature 0 draws the same response every time"),
        ({"eval_samples": 0}, "eval_samples is 0: set it to 1 or more"),
        (
            {"eval_on_start": True, "eval_prompts": None, "eval_strategy": "no"},
            "eval_on_start is True, but there are no held-out",
        ),
        ({"kept_prompts": -1}, "kept_prompts is -1: set it to 0 or more"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(make, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**changes)
