"""The whole line on real data: GSM8K reformatted, answered, gathered, trained on and scored by the real programs."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from spin import convert_data, evaluate_model, reformat, run_spin
from spin.alignment.pairs.counts import read_counts
from spin.generate import main as generate
from tests.helpers import run_main, save_tiny_model


def run(main, *arguments: object) -> str:
    code, out, error = run_main(main, *arguments)
    assert code == 0, error
    return out


@pytest.mark.slow
def test_the_whole_line_on_gsm8k(gsm8k, tmp_path):
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    out = run(reformat.main, "--data", gsm8k, "--output_dir", tmp_path / "data", "--subset", 60, "--test_size", 20)
    assert "7473 rows read" in out
    assert "wrote 60 training and 20 test rows" in out
    for split in ("train", "test"):
        for fraction in range(2 if split == "train" else 1):
            run(
                *(generate, "--model", model, "--input_dir", tmp_path / "data", "--output_dir", tmp_path / "generated"),
                *("--split", split, "--data_frac", fraction, "--frac_len", 30 if split == "train" else 0),
                *("--max_new_tokens", 24, "--batch_size", 30, "--max_prompt_length", 600),
            )
    out = run(
        convert_data.main, "--input_dir", tmp_path / "generated", "--output_dir", tmp_path / "pairs", "--num_fracs", 2
    )
    counts = read_counts(tmp_path / "pairs" / "train_prefs.counts.json")
    assert counts["rows"] + counts["skipped"] == 60
    assert counts["written"] == counts["rows"]
    config = {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(tmp_path / "pairs"): 1.0},
        "dataset_splits": ["train_prefs", "test_prefs"],
        "output_dir": str(tmp_path / "iter0"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 6,
        "max_steps": 5,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": 512,
        "max_prompt_length": 256,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run(run_spin.main, tmp_path / "config.yaml")
    metrics = json.loads((tmp_path / "iter0" / "metrics.json").read_text())
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["pairs"] == {"train": counts["written"], "test": 20}
    assert metrics["final"]["rewards/margins"] > 0
    run(
        *(
            evaluate_model.main,
            "--model",
            tmp_path / "iter0",
            "--input_dir",
            tmp_path / "data",
            "--metric",
            "math_answer",
        ),
        *("--output_file", tmp_path / "eval.json", "--max_new_tokens", 24, "--limit", 10, "--temperatures", 0),
    )
    scores = json.loads((tmp_path / "eval.json").read_text())
    assert scores["n"] == 10
    assert 0 < scores["nll"] < 10
