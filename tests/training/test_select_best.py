"""``select: best``: the weights of the epoch with the best held-out metric are saved, and said to be."""

from __future__ import annotations

import json

import pytest

from spin import run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.sft_config import SFTArguments
from tests.helpers import run_main
from tests.helpers.training import write_config, write_pairs


def test_the_best_epoch_is_saved(tiny_model, tmp_path):
    from safetensors.torch import load_file

    pairs = write_pairs(tmp_path / "pairs")
    # Held-out pairs that prefer what training makes less likely: their loss rises from epoch to epoch.
    swapped = [json.loads(line) for line in (pairs / "train_prefs.jsonl").read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in swapped[:6]]
    (pairs / "test_prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    splits = {"dataset_splits": ["train_prefs", "test_prefs"], "num_train_epochs": 3, "save_strategy": "epoch"}
    config = write_config(tmp_path / "best.yaml", tiny_model, pairs, **splits, select="best")
    code, out, err = run_main(run_spin.main, config)
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in metrics["history"][:-1] if "eval_loss" in entry}
    chosen = metrics["selected"]
    assert list(losses) == [6, 12, 18] and chosen["step"] == min(losses, key=losses.get) != 18
    assert chosen["value"] == min(losses.values()) == pytest.approx(metrics["final"]["eval_loss"], rel=1e-4)
    assert f"saving the weights of step {chosen['step']}: loss" in out
    saved = load_file(tmp_path / "out" / "model.safetensors")
    best = load_file(tmp_path / "out" / "checkpoints" / f"checkpoint-{chosen['step']}" / "model.safetensors")
    assert all(bool((weight == best[name]).all()) for name, weight in saved.items())


@pytest.mark.parametrize("kind", [SPINConfig, SFTArguments])
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"save_strategy": "no"}, "save_strategy is no"),
        ({"eval_strategy": "steps"}, "remove eval_strategy"),
        ({"save_only_model": True}, "save_only_model is true"),
    ],
)
def test_keys_that_ask_for_something_else(kind, keys, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        kind(output_dir=str(tmp_path), use_cpu=True, select="best", **keys)


def test_steps_are_evaluated_when_they_are_saved(tmp_path):
    found = SPINConfig(output_dir=str(tmp_path), use_cpu=True, select="best", save_strategy="steps", save_steps=7)
    assert (found.eval_strategy.value, found.eval_steps, found.load_best_model_at_end) == ("steps", 7, True)
    assert (found.metric_for_best_model, found.greater_is_better) == ("loss", False)
    assert SPINConfig(output_dir=str(tmp_path), use_cpu=True).load_best_model_at_end is False


def test_held_out_rows_are_needed(tiny_model, pairs, tmp_path):
    config = write_config(tmp_path / "none.yaml", tiny_model, pairs, select="best", save_strategy="epoch")
    code, _, err = run_main(run_spin.main, config)
    assert code == 2 and "names no test split" in err
