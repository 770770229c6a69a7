"""The card that a training writes: valid for the Hub, the same for the same inputs; and where its checkpoints end up."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from spin import run_sft, run_spin
from tests.helpers import run_main
from tests.helpers.training import write_config


def train(folder, program, *arguments, **settings):
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "c.yaml", *arguments, max_steps=2, save_strategy="steps", save_steps=1, **settings)
    code, _, err = run_main(program.main, config)
    assert code == 0, err
    return folder / "out"


@pytest.fixture(scope="module")
def out(tiny_model, pairs, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("one"), run_spin, tiny_model, pairs, dataset_splits=["train_prefs", "test_prefs"]
    )


def test_the_card_is_valid_and_says_how_the_model_was_made(out, tiny_model, pairs):
    card = ModelCard.load(out / "README.md")
    data, inputs = card.data.to_dict(), json.loads((out / "inputs.json").read_text())
    assert data["license"] == "unknown" and data["library_name"] == "transformers" and "base_model" not in data
    assert {"selfplay-spin", "sigmoid"} <= set(data["tags"])
    for text in (
        "arXiv 2401.01335, eq. 4.7",
        "log sigmoid(beta m)",
        inputs["model"],
        inputs["data"],
        "python spin/run_spin.py config.yaml",
        "learning_rate: 0.001",
        "Seed 42",
        "torch 2.",
        "Licence: unknown.",
    ):
        assert text in card.text, text
    assert str(pairs.parent) not in card.text and str(out.parent) not in card.text
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| rewards/margins")]
    assert len(rows) == 1 and rows[0][1][0].isdigit() and rows[0][2] != "–"


def test_the_same_training_elsewhere_writes_the_same_card(out, tiny_model, pairs, tmp_path):
    settings = {"dataset_splits": ["train_prefs", "test_prefs"]}
    again = train(tmp_path, run_spin, tiny_model, pairs, **settings)
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_the_checkpoints_of_a_complete_training_are_put_away_and_taken_back(out):
    kept = out / "checkpoints"
    assert not list(out.glob("checkpoint-*")) and (kept / "checkpoint-2" / "optimizer.pt").is_file()
    for name in ("metrics.json", "config.json"):
        (out / name).unlink()
    code, said, err = run_main(run_spin.main, out.parent / "c.yaml")
    assert code == 0, err
    assert f"resuming from {out / 'checkpoint-2'}" in said
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    (kept / "checkpoint-2").rename(out / "checkpoint-2")  # killed before it was moved
    code, said, err = run_main(run_spin.main, out.parent / "c.yaml")
    assert code == 0 and "already complete" in said and (kept / "checkpoint-2").is_dir(), err


def test_a_checkpoint_that_was_put_away_can_be_named(out):
    (out / "metrics.json").unlink()
    point = out / "checkpoints" / "checkpoint-1"
    code, said, err = run_main(run_spin.main, out.parent / "c.yaml", f"--resume_from_checkpoint={point}")
    assert code == 0 and f"resuming from {point}" in said, err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_licence_of_a_setting_and_the_base_of_the_start(tmp_path, tiny_model):
    import shutil

    from tests.helpers.runs import write_sums

    start = tmp_path / "start"
    shutil.copytree(tiny_model, start)
    (start / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n")
    sums = write_sums(tmp_path / "sums")
    out = train(tmp_path / "a", run_sft, start, sums, dataset_splits=["train"])
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")
    assert "Base model: org/base" in card.text and "negative log-probs" in card.text
