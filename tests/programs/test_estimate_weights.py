"""The program that weighs tokens, on tiny random models: its numbers, its files, killed and started again, bad input."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.provenance import read_provenance
from spin.alignment.core.sides import SIDES
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.preferences import load_preferences
from tests.helpers import REPOSITORY, char_tokenizer, program_environment
from tests.helpers.weights import (
    logps_by_hand,
    models,
    rows_of,
    weigh,
    write_pairs,
)


def test_weights_are_those_of_the_stored_ids(scoring_models, weighed):
    encoder = ChatEncoder(char_tokenizer())
    before, after = rows_of(scoring_models / "pairs"), rows_of(weighed)
    assert [row["prompt_id"] for row in after] == [row["prompt_id"] for row in before]
    for row, old in zip(after[:4], before, strict=False):
        assert row["rejected_token_ids"] == old["rejected_token_ids"]
        assert row["chosen_token_ids"] == encoder.response_ids(row["chosen"])
        assert row["chosen_token_ids"][-1] == encoder.end_id and row["chosen_finish_reason"] == "stop"
        prompt = encoder.prompt_ids(row["chosen"][:-1])
        for side, sign in (("chosen", 1), ("rejected", -1)):
            plus, minus = (
                logps_by_hand(scoring_models / name, prompt, row[f"{side}_token_ids"]) for name in ("plus", "minus")
            )
            expected = np.exp(sign * np.clip(plus - minus, -0.5, 1.5))  # TIS-DPO, eq. 11
            assert row[f"{side}_weights"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_files_keep_names_rows_and_origin_and_say_how_they_were_weighed(scoring_models, weighed):
    names = sorted(path.name for path in (scoring_models / "pairs").glob("*.parquet"))
    assert sorted(path.name for path in weighed.glob("*.parquet")) == names
    provenance = read_provenance(pq.read_schema(weighed / names[0]), names[0])
    facts = provenance.extra["weights"]
    assert provenance.iteration == 3 and facts["weighting"] == "reverse_dpo" and facts["transform"] == "exponential"
    assert len({facts["model_plus"]["weights_hash"], facts["model_minus"]["weights_hash"]}) == 2
    assert load_preferences(str(weighed), "train_prefs").num_rows == 10
    statistics = json.loads((weighed / "train_prefs.weights.json").read_text())
    assert statistics["rows"] == 10 and statistics["rejected"]["tokens"] == sum(
        len(row["rejected_token_ids"]) for row in rows_of(weighed)
    )


def test_finished_weights_are_left_alone_and_changed_ones_refused(scoring_models, weighed):
    stamp = (weighed / "train_prefs-00000-of-00002.parquet").stat().st_mtime_ns
    code, out, _ = weigh(scoring_models, weighed, "--weighting", "reverse_dpo", *models(scoring_models))
    assert code == 0 and "already complete" in out
    assert (weighed / "train_prefs-00000-of-00002.parquet").stat().st_mtime_ns == stamp
    code, _, err = weigh(
        scoring_models, weighed, "--weighting", "reverse_dpo", *models(scoring_models), "--transform", "binary"
    )
    assert code == 2 and "transform differ" in err and "--overwrite" in err
    code, _, err = weigh(
        scoring_models, weighed, "--weighting", "reverse_dpo", *models(scoring_models), "--dtype", "bfloat16"
    )
    assert code == 2 and "model_plus, model_minus differ" in err


def test_scores_serve_another_transform_without_loading_a_model(scoring_models, weighed, tmp_path, monkeypatch):
    import shutil

    from spin.alignment.token_weights import model_scores as token_scores

    shutil.copytree(weighed / ".scores", tmp_path / "out" / ".scores")
    monkeypatch.setattr(token_scores, "load_model", None)
    arguments = ("--weighting", "reverse_dpo", *models(scoring_models), "--transform", "rank_based")
    code, _, err = weigh(scoring_models, tmp_path / "out", *arguments)
    assert code == 0, err
    weights = [value for row in rows_of(tmp_path / "out") for value in row["chosen_weights"]]
    assert min(weights) == pytest.approx(0.7) and max(weights) == pytest.approx(1.3)


def test_packed_and_padded_rows_give_the_same_weights(scoring_models, weighed, tmp_path):
    arguments = ("--weighting", "reverse_dpo", *models(scoring_models), "--batching", "padded")
    assert weigh(scoring_models, tmp_path / "out", *arguments)[0] == 0
    for ours, theirs in zip(rows_of(tmp_path / "out"), rows_of(weighed), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], rel=1e-3)


# --- teachers -----------------------------------------------------------------------------------------------------------


def test_teacher_of_another_tokenizer_keeps_the_sum_and_compares_ends(scoring_models, tmp_path):
    """The gains of a response add up to the difference of both log-probs of its text, each under its own tokenizer."""
    arguments = ("--weighting", "teacher", *models(scoring_models, "teacher"), "--transform", "origin")
    code, out, err = weigh(scoring_models, tmp_path / "out", *arguments)
    assert code == 0, err
    assert "are negative" in out
    from transformers import AutoTokenizer

    teacher = ChatEncoder(AutoTokenizer.from_pretrained(scoring_models / "teacher"))
    student = ChatEncoder(char_tokenizer())
    for row in rows_of(tmp_path / "out"):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            conversation, ids = row[side], row[f"{side}_token_ids"]
            ended = ids[-1] == student.end_id
            theirs = teacher.response_ids(conversation) if ended else teacher.response_ids(conversation)[:-1]
            high = logps_by_hand(scoring_models / "teacher", teacher.prompt_ids(conversation[:-1]), theirs)
            low = logps_by_hand(scoring_models / "minus", student.prompt_ids(conversation[:-1]), ids)
            weights = row[f"{side}_weights"]
            assert sign * sum(weights) == pytest.approx(high.sum() - low.sum(), abs=1e-3)
            if ended:
                assert sign * weights[-1] == pytest.approx(high[-1] - low[-1], abs=1e-4)


def test_teacher_of_the_same_tokenizer_is_compared_by_ids_and_the_character_way_agrees(
    scoring_models, tmp_path, monkeypatch
):
    from spin.alignment.core.provenance import hash_text

    exact = ("--weighting", "teacher", *models(scoring_models), "--transform", "origin")
    assert weigh(scoring_models, tmp_path / "exact", *exact)[0] == 0
    original = ChatEncoder.tokenizer_hash.func
    monkeypatch.setattr(  # let them look like different tokenizers
        ChatEncoder, "tokenizer_hash", property(lambda self: hash_text(original(self), self.name))
    )
    assert weigh(scoring_models, tmp_path / "characters", *exact)[0] == 0
    for ours, theirs in zip(rows_of(tmp_path / "exact"), rows_of(tmp_path / "characters"), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], abs=1e-5)


# --- without models, and unusual rows ------------------------------------------------------------------------------------


def test_drift_needs_the_tokenizer_alone(scoring_models, tmp_path):
    code, _, err = weigh(
        scoring_models, tmp_path / "out", "--weighting", "drift", "--tokenizer", scoring_models / "minus"
    )
    assert code == 0, err
    row = rows_of(tmp_path / "out")[0]  # red EOS against "green tea" EOS: r, e and EOS are common
    assert row["chosen_weights"] == [0, 0, 1, 0] and row["rejected_weights"] == [1, 0, 0, 1, 1, 1, 1, 1, 1, 0]


def test_constant_weights_are_warned_of(scoring_models, tmp_path):
    arguments = ["--weighting", "reverse_dpo", *models(scoring_models), "--transform", "exponential"]
    code, out, _ = weigh(scoring_models, tmp_path / "out", *arguments, "--transform_params", "mu=0", "k=2")
    assert code == 0 and "warning: every weight is 2 (transform exponential)" in out
    code, out, _ = weigh(
        scoring_models, tmp_path / "uniform", "--weighting", "uniform", "--tokenizer", scoring_models / "minus"
    )
    assert code == 0 and "warning" not in out  # that is what was asked for


def test_tokens_beyond_max_length_have_no_weight_and_that_is_said(scoring_models, tmp_path):
    arguments = [
        "--weighting",
        "reverse_dpo",
        *models(scoring_models),
        "--max_length",
        "24",
        "--max_prompt_length",
        "12",
    ]
    code, out, _ = weigh(scoring_models, tmp_path / "out", *arguments)
    assert code == 0 and "beyond max_length 24" in out
    rows = rows_of(tmp_path / "out")
    assert all(len(row[f"{side}_weights"]) == len(row[f"{side}_token_ids"]) for row in rows for side in SIDES)
    longest = max(rows, key=lambda row: len(row["chosen_token_ids"]))
    unknown = [math.isnan(weight) for weight in longest["chosen_weights"]]
    assert unknown == [False] * 12 + [True] * (len(unknown) - 12)


def test_a_row_that_training_leaves_out_is_kept_without_weights(scoring_models, tmp_path):
    chosen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x <|im_end|> y"}]
    rejected = [chosen[0], {"role": "assistant", "content": "red"}]
    write_pairs(tmp_path / "pairs", 3, 1)
    rows = rows_of(tmp_path / "pairs")
    ids = rows[1]["rejected_token_ids"]
    rows[0]["rejected_finish_reason"] = "length"  # what is stored is kept, also where it surprises
    rows[1] |= {"chosen": chosen, "rejected": rejected}
    file = tmp_path / "pairs" / "train_prefs-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(file)), file)
    code, out, err = weigh(tmp_path, tmp_path / "out", "--weighting", "drift", "--tokenizer", scoring_models / "minus")
    assert code == 0, err
    assert "1 without weights" in out and "control token" in out
    after = rows_of(tmp_path / "out")
    assert [row["chosen_weights"] is None for row in after] == [False, True, False]
    assert after[1]["rejected_token_ids"] == ids and after[1]["chosen_token_ids"] is None
    assert [row["rejected_finish_reason"] for row in after] == ["length", "stop", "length"]


# --- the page -------------------------------------------------------------------------------------------------------------


def test_page_shows_tokens_escaped_with_their_weights(weighed):
    page = (weighed / "page.html").read_text()
    assert page.count('<dl class="panel pair">') == 8 and "://" not in page
    assert "&lt;|im_end|&gt;" in page and "<|im_end|>" not in page
    row = rows_of(weighed)[0]
    assert f'title="r: {row["chosen_weights"][0]:.3f}">r</span>' in page
    assert "reverse_dpo" in page and 'class="legend"' in page


def test_colours_of_the_page():
    from spin.alignment.report.weights_page import Scale, Token, render_weights_page

    scale = Scale.of([0.5, 1.0, 1.5, math.nan])
    assert (scale.low, scale.middle, scale.high) == (0.5, 1.0, 1.5)
    assert scale.style(1.25) == "background: rgba(var(--more), 0.38)" and "--less), 0.75" in scale.style(0.5)
    page = render_weights_page([("q", {"chosen": [Token("<b>\n", "x", -1.0), Token("", "</s>", math.nan)]})], ["a & b"])
    assert "&lt;b&gt;⏎\n" in page and 'class="t minus"' in page and 'class="t end none"' in page and "a &amp; b" in page
    assert "not scored" in page


# --- killed and resumed, several processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_weights(scoring_models, weighed, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable,
        "spin/estimate_weights.py",
        "--input_dir",
        scoring_models / "pairs",
        "--output_dir",
        output,
    ]
    command += ["--weighting", "reverse_dpo", *models(scoring_models), "--dtype", "float32"]
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=program_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((output / ".scores").glob("train-*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    from tests.helpers import run_command

    done = run_command(words, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(rows_of(output), rows_of(weighed), strict=True):
        assert all(ours[f"{side}_weights"] == theirs[f"{side}_weights"] for side in SIDES)


@pytest.mark.slow
def test_two_processes_give_the_same_weights(scoring_models, weighed, tmp_path):
    from tests.helpers import run_command
    from tests.helpers.training import launcher

    command = [
        sys.executable,
        *launcher("cpu.yaml"),
        "spin/estimate_weights.py",
        "--input_dir",
        scoring_models / "pairs",
    ]
    command += [
        "--output_dir",
        tmp_path / "out",
        "--weighting",
        "reverse_dpo",
        *models(scoring_models),
        "--dtype",
        "float32",
    ]
    done = run_command(command, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("10 rows weighted") == 1
    for ours, theirs in zip(rows_of(tmp_path / "out"), rows_of(weighed), strict=True):
        for side in SIDES:
            assert ours[f"{side}_weights"] == pytest.approx(theirs[f"{side}_weights"], rel=1e-4)


# --- bad input: one sentence, exit code 2 ----------------------------------------------------------------------------------
