"""Scores of a model on held-out prompts, against values worked out another way."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spin import evaluate_model
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.evaluation.held_out import encode_held_out, ground_truth_nll, mean_and_error, score_responses
from spin.alignment.generation.base import Response
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.rewards import SCORERS
from tests.helpers import run_main
from tests.helpers.runs import write_sums


def rows(count):
    return [
        {
            "prompt_id": str(i),
            "chosen": [{"role": "user", "content": "1+" * i + "1"}, {"role": "assistant", "content": str(i + 1)}],
        }
        for i in range(count)
    ]


def test_nll_equals_a_plain_forward_pass_row_by_row(tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    model = load_model(ModelConfig(model_name_or_path=str(tiny_model))).eval()
    held_out, left_out = encode_held_out(rows(5), encoder, 512, 8)
    assert left_out == 0
    sums, tokens = [], 0
    for item in held_out:
        ids = torch.tensor([[*item.request.token_ids, *item.ground_truth_ids]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)
        start = len(item.request.token_ids)
        sums.append(-sum(logps[0, t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        tokens += len(item.ground_truth_ids)
    found = ground_truth_nll(model, held_out, encoder.pad_id, batch_size=2)
    assert found["nll"] == pytest.approx(sum(sums) / tokens, rel=1e-5)
    assert found["nll_sequence"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert all(item.ground_truth_ids[-1] == encoder.end_id for item in held_out)


def test_standard_error_by_hand():
    # values 0, 1: mean 1/2, variance 1/2 with n - 1, error sqrt(1/2 / 2) = 1/2
    assert mean_and_error([0.0, 1.0]) == (0.5, 0.5)
    assert mean_and_error([3.0]) == (3.0, 0.0)


def test_scores_of_responses(tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    held_out, _ = encode_held_out(rows(4), encoder, 512, 8)
    responses = [
        Response([1, 2], "stop"),
        Response([1], "stop"),
        Response([1, 1, 1], "length"),
        Response([1, 1], "stop"),
    ]
    found = score_responses(held_out, responses, ["1", "2 ", "x", "y"], SCORERS["exact_match"])
    assert found["exact"] == 0.5 and found["identical_rate"] == 0.5
    assert found["truncation_rate"] == 0.25 and found["mean_length"] == 2.0
    assert found["exact_se"] == pytest.approx(math.sqrt((1 / 3) / 4))


def test_prompts_that_do_not_fit_are_counted(tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    lengths = [len(encoder.prompt_ids(row["chosen"][:-1])) for row in rows(4)]
    held_out, left_out = encode_held_out(rows(4), encoder, lengths[2] + 8, 8)
    assert (len(held_out), left_out) == (3, 1)


def test_program_writes_one_json_and_repeats_itself(tiny_model, tmp_path):
    data = write_sums(tmp_path / "data")
    texts = []
    for batch_size in (2, 8):
        output = tmp_path / f"eval{batch_size}.json"
        flags = [
            "--max_new_tokens",
            4,
            "--batch_size",
            batch_size,
            "--temperatures",
            0,
            1,
            "--limit",
            6,
            "--samples",
            2,
        ]
        code, _, err = run_main(
            evaluate_model.main, "--model", tiny_model, "--input_dir", data, "--output_file", output, *flags
        )
        assert code == 0, err
        texts.append(json.loads(output.read_text()))
    first, second = texts
    assert first["n"] == 6 and list(first["temperatures"]) == ["0", "1"] and len(first["samples"]) == 2
    assert first["temperatures"] == second["temperatures"] and first["samples"] == second["samples"]
    assert first["nll"] == pytest.approx(second["nll"], rel=1e-5)


def test_a_metric_by_dotted_path_and_a_sum(tiny_model, tmp_path):
    data, output = write_sums(tmp_path / "data"), tmp_path / "eval.json"
    for metric, expected in (("tests.helpers.online:always_same", 1.0), ("0.5*tests.helpers.online:always_same", 0.5)):
        code, _, err = run_main(
            *(evaluate_model.main, "--model", tiny_model, "--input_dir", data, "--output_file", output),
            *("--max_new_tokens", 2, "--limit", 3, "--temperatures", 0, "--metric", metric),
        )
        assert code == 0, err
        assert json.loads(output.read_text())["temperatures"]["0"]["exact"] == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--metric", "no_such_module:f"], "no_such_module"),
        (["--metric", "bleu"], "unknown metric 'bleu'"),
        (["--temperatures", "-1"], "temperatures is -1"),
        (["--temperatures", "1", "1"], "name one or more, each once"),
        (["--limit", "-1"], "limit is -1"),
        (["--model", "./none"], "none does not exist"),
        (["--max_new_tokens", "100000"], "lower max_new_tokens"),
        (["--split", "nothing"], "nothing"),
    ],
)
def test_bad_input(tiny_model, tmp_path, flags, sentence):
    output = tmp_path / "eval.json"
    base = ["--model", tiny_model, "--input_dir", write_sums(tmp_path / "data"), "--output_file", output]
    code, _, err = run_main(evaluate_model.main, *base, *flags)
    assert code == 2 and sentence in err and not output.exists()
