"""What estimate_weights.py and a training with weights refuse: one sentence each, before a model is loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import run_main, tiny_llama
from tests.helpers.weights import (
    models,
    save_teacher,
    weigh,
    write_pairs,
)

BAD = {
    "unknown weighting": (
        ["attention"],
        "unknown weighting 'attention': choose one of drift, reverse_dpo, stored_gains, teacher",
    ),
    "model missing": (["reverse_dpo", "--model_plus", "W/plus"], "compares two models: pass --model_minus"),
    "models unused": (["drift", "--tokenizer", "W/plus", "--model_plus", "W/plus"], "drift does not use --model_plus"),
    "no tokenizer": (["drift"], "needs the data's tokenizer: pass --tokenizer"),
    "lengths unused": (["drift", "--tokenizer", "W/plus", "--max_length", "9"], "does not use --max_length: remove it"),
    "precision unused": (["uniform", "--tokenizer", "W/plus", "--dtype", "float32"], "does not use --dtype: remove it"),
    "transform unused": (["uniform", "--tokenizer", "W/plus", "--transform", "binary"], "does not use --transform"),
    "no such model": (["teacher", "--model_plus", "./none", "--model_minus", "W/minus"], "./none does not exist"),
    "one model": (["teacher", "--model_plus", "W/plus", "--model_minus", "W/plus"], "have the same weights"),
    "other tokenizer": (
        ["reverse_dpo", "--model_plus", "W/teacher", "--model_minus", "W/minus"],
        "have different tokenizers, which reverse_dpo cannot align",
    ),
    "other data": (
        ["reverse_dpo", "--model_plus", "W/teacher", "--model_minus", "W/other"],
        "row 0: rejected_token_ids do not decode to the text of the rejected response",
    ),
    "parameter": (
        ["teacher", *["--model_plus", "W/plus", "--model_minus", "W/minus"], "--transform_params", "mu"],
        "key=value",
    ),
    "own seed": (
        ["teacher", "--model_plus", "W/plus", "--model_minus", "W/minus", "--transform_params", "seed=1"],
        "pass --seed",
    ),
    "lengths": (
        ["reverse_dpo", "--model_plus", "W/plus", "--model_minus", "W/minus", "--max_length", "9"],
        "max_prompt_length is 512 and max_length 9",
    ),
    "page rows": (["drift", "--tokenizer", "W/plus", "--page_rows", "0"], "page_rows is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(scoring_models, tmp_path, name):
    arguments, sentence = BAD[name]
    if "W/other" in arguments:
        save_teacher(scoring_models / "other")
        save_other_weights(scoring_models / "other")
    words = [str(word).replace("W/", f"{scoring_models}/") for word in arguments]
    code, _, err = weigh(scoring_models, tmp_path / "out", "--weighting", *words)
    said = err.strip().splitlines()[-1]  # a progress bar may stand above it
    assert code == 2 and said.startswith("error: ") and "Traceback" not in err
    assert sentence in said, err
    assert not (tmp_path / "out").exists()


def save_other_weights(folder: Path) -> None:
    from transformers import AutoTokenizer

    tiny_llama(len(AutoTokenizer.from_pretrained(folder)), seed=9).save_pretrained(folder)


def test_teacher_without_offsets_is_refused_before_a_model_is_loaded(scoring_models, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    from spin.alignment.token_weights import model_scores as token_scores

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    monkeypatch.setattr(token_scores, "load_model", None)
    code, _, err = weigh(scoring_models, tmp_path / "out", "--weighting", "teacher", *models(scoring_models, "teacher"))
    assert code == 2 and "has no character offsets" in err and "tokenizer.json" in err


def test_folders_are_checked(scoring_models, tmp_path):
    code, _, err = weigh(
        scoring_models, scoring_models / "pairs", "--weighting", "drift", "--tokenizer", scoring_models / "minus"
    )
    assert code == 2 and "output_dir is the same as input_dir" in err
    (tmp_path / "empty").mkdir()
    arguments = ("--weighting", "drift", "--tokenizer", scoring_models / "minus")
    code, _, err = weigh(tmp_path, tmp_path / "out", *arguments, pairs="empty")
    assert code == 2 and "has no files such as train_prefs" in err


def test_help_is_light():
    code = (
        "import contextlib, sys, spin.estimate_weights as e\nwith contextlib.suppress(SystemExit): e.main(['--help'])\n"
    )
    code += "sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- weights in training ----------------------------------------------------------------------------------------------------


def train_on(tmp_path: Path, scoring_models: Path, change) -> tuple[int, str]:
    """Weigh with drift, change the rows, and start a training on them; return its exit code and last sentence."""
    from spin import run_spin
    from tests.helpers.training import write_config

    out = tmp_path / "out-of-weigh"
    assert weigh(scoring_models, out, "--weighting", "drift", "--tokenizer", scoring_models / "minus")[0] == 0
    for file in out.glob("*.parquet"):
        table = pq.read_table(file)
        rows = table.to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    config = write_config(tmp_path / "c.yaml", scoring_models / "minus", out)
    code, _, err = run_main(run_spin.main, config)
    return code, err.strip().splitlines()[-1]


def test_weights_of_the_wrong_length_are_refused(scoring_models, tmp_path):
    code, said = train_on(tmp_path, scoring_models, lambda rows: rows[3]["chosen_weights"].append(1.0))
    assert code == 2 and "chosen_weights must have one weight per token" in said and "(prompt p" in said


def test_weights_that_are_no_numbers_are_refused(scoring_models, tmp_path):
    code, said = train_on(tmp_path, scoring_models, lambda rows: rows[0]["rejected_weights"].__setitem__(1, math.nan))
    assert code == 2 and "rejected_weights is nan at token 1: compute them again" in said


def test_rows_without_weights_are_refused(scoring_models, tmp_path):
    code, said = train_on(tmp_path, scoring_models, lambda rows: rows[2].update(chosen_weights=None))
    assert code == 2 and "but has none" in said


def test_weights_of_pairs_in_other_files_do_not_stay_beside_the_new_ones(tmp_path, tiny_model):
    """Converted again, pairs may be in fewer or more files: a reader would find two sets."""
    arguments = ("--weighting", "uniform", "--tokenizer", tiny_model)
    write_pairs(tmp_path / "one", files=1)
    write_pairs(tmp_path / "two", files=2)
    out = tmp_path / "out"
    assert weigh(tmp_path, out, *arguments, pairs="one")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    code, _, err = weigh(tmp_path, out, *arguments, pairs="two")
    assert code == 2 and "train_prefs-00000-of-00001.parquet was created from other pairs" in err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert weigh(tmp_path, out, *arguments, "--overwrite", pairs="two")[0] == 0
    assert sorted(path.name for path in out.glob("*.parquet")) == [
        f"train_prefs-0000{number}-of-00002.parquet" for number in range(2)
    ]
