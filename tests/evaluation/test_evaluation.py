"""Scores of a model on held-out prompts, against values worked out another way."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spin import evaluate_model
from spin.alignment.core.parquet import read_rows
from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
from spin.alignment.evaluation.answers import Answers, respond_at_all
from spin.alignment.evaluation.averages import average_responses
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.evaluate import scored
from spin.alignment.evaluation.held_out import HeldOut, encode_held_out, ground_truth_nats, scored_together
from spin.alignment.evaluation.responses import read_responses, scored_rows
from spin.alignment.generation.base import PromptRequest, Response
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model
from spin.alignment.rewards import SCORERS, Part, Score
from spin.alignment.rewards.rules import RuleScorer
from tests.helpers import run_main
from tests.helpers.real_templates import byte_tokenizer
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
    held_out, skipped = encode_held_out(rows(5), encoder, 512, 8)
    assert skipped == []
    sums = []
    for item in held_out:
        ids = torch.tensor([[*item.request.token_ids, *item.ground_truth_ids]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)
        start = len(item.request.token_ids)
        sums.append(-sum(logps[0, t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
    for batch_size in (1, 2, 5):
        assert ground_truth_nats(model, held_out, encoder.pad_id, batch_size) == pytest.approx(sums, rel=1e-5)
    assert all(item.ground_truth_ids[-1] == encoder.end_id for item in held_out)


def test_ground_truths_are_scored_in_batches_whose_logits_fit():
    """A batch of 64 answers under a vocabulary of 128,000 would have 17 GB of logits."""
    lengths = [(3, 10), (9, 4), (1, 2), (2, 2), (4, 9), (2, 30)]
    held_out = [
        HeldOut(PromptRequest(str(number), (7,) * prompt), [], "x", (8,) * answer)
        for number, (prompt, answer) in enumerate(lengths)
    ]
    held_out.append(HeldOut(PromptRequest("none", (7,)), [], None, ()))
    # Longest first; 20 positions are two answers of 10, and the one of 30 is alone.
    assert list(scored_together(held_out, 4, 20)) == [[5], [0, 1], [4, 3], [2]]
    assert list(scored_together(held_out, 4, 40)) == [[5], [0, 1, 4, 3], [2]]
    assert list(scored_together(held_out, 1, 40)) == [[5], [0], [1], [4], [3], [2]]


def broken_on_two(prompt: str, response: str, reference: str) -> float:
    """A metric that fails on one prompt."""
    if prompt == "1+1+1":
        raise ZeroDivisionError("nothing to divide")
    return float(response == reference)


def always_broken(prompt: str, response: str, reference: str) -> float:
    raise ValueError("never works")


def test_scores_of_responses(tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    held_out, _ = encode_held_out(rows(4), encoder, 512, 8)
    responses = [
        Response([1, 2], "stop"),
        Response([1], "stop"),
        Response([1, 1, 1], "length"),
        Response([1, 1], "stop"),
    ]
    scorer, skipped = RuleScorer("exact_match", SCORERS["exact_match"]), []
    made = scored_rows("m", 0.0, held_out, responses, ["1", "2 ", "x", "y"], scorer, skipped)
    found = average_responses(made)
    assert skipped == [] and [row["prompt_id"] for row in made] == ["0", "1", "2", "3"]
    assert found["exact"] == 0.5 and found["identical_rate"] == 0.5
    assert found["truncation_rate"] == 0.25 and found["mean_length"] == 2.0
    assert found["exact_se"] == pytest.approx(math.sqrt((1 / 3) / 4))
    assert found["mean_length_se"] == pytest.approx(math.sqrt((2 / 3) / 4))


class Sampled:
    """A backend that gives the same ids to every prompt."""

    def __init__(self, ids):
        self.ids = ids

    def stream(self, requests, sampling):
        yield from ((number, [Response(self.ids, "length")]) for number, _ in enumerate(requests))


def test_a_row_that_opens_a_thought_has_it_in_the_text_of_its_response(tmp_path):
    """Truncated inside its thought, a response has no answer, whatever the thought ends with."""
    template = (
        "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
    )
    encoder = ChatEncoder(byte_tokenizer(template, plain=("<think>", "</think>")))
    opens = {**rows(1)[0], "chat_template_kwargs": '{"enable_thinking": true}'}
    held_out, _ = encode_held_out([opens, *rows(2)[1:]], encoder, 512, 8)
    ids = encoder.tokenizer("So it is\n1")["input_ids"]
    config = EvaluateConfig(
        model="m", input_dir=".", output_file=str(tmp_path / "e.json"), temperatures=[0.0], metric="math_answer"
    )
    responses = respond_at_all(config, Sampled(ids), held_out)
    made = scored(config, Answers(responses, [1.0, 1.0]), held_out, encoder, [])
    assert [row["response"] for row in made] == ["<think>\nSo it is\n1", "So it is\n1"]
    assert average_responses(made)["exact"] == 0.0 and [item.ground_truth for item in held_out] == ["1", "2"]


def test_prompts_that_do_not_fit_are_named(tiny_model):
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    lengths = [len(encoder.prompt_ids(row["chosen"][:-1])) for row in rows(4)]
    held_out, skipped = encode_held_out(rows(4), encoder, lengths[2] + 8, 8)
    assert len(held_out) == 3 and [item["prompt_id"] for item in skipped] == ["3"]
    assert "lower max_new_tokens" in skipped[0]["reason"]


def write_bad_rows(folder, good=4):
    """Good rows, and one of every kind that must not end an evaluation."""
    lines = [{"prompt_id": row["prompt_id"], "messages": row["chosen"]} for row in rows(good)]

    def of(prompt_id, question, answer):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"prompt_id": prompt_id, "messages": turns}

    lines += [of("long", "1" * 600, "2"), of("long answer", "1", "2" * 600), of("empty", "1", "")]
    lines += [
        of("end in answer", "1", "2<|im_end|>3"),
        of("end in prompt", "1<|im_end|>", "2"),
        of("empty prompt", "", "2"),
    ]
    lines += [{"prompt_id": "no answer", "messages": [{"role": "user", "content": "1"}]}]
    lines += [
        {"prompt_id": "number", "messages": [{"role": "user", "content": 1}]},
        {"prompt_id": "foreign", "text": "x"},
    ]
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, [line["prompt_id"] for line in lines[good:]]


def test_bad_rows_are_skipped_and_named(tiny_model, tmp_path):
    data, bad = write_bad_rows(tmp_path / "data")
    output = tmp_path / "eval.json"
    code, _, err = run_main(
        *(
            evaluate_model.main,
            "--model",
            tiny_model,
            "--input_dir",
            data,
            "--output_file",
            output,
            "--max_new_tokens",
            4,
        ),
        *("--temperatures", 0, 1, "--metric", "tests.evaluation.test_evaluation:broken_on_two"),
    )
    assert code == 0, err
    found = json.loads(output.read_text())
    names = [item["prompt_id"] for item in found["skipped"]]
    assert found["n"] == 4 and sorted(names) == sorted([*bad, "2", "2"])  # the metric failed at both temperatures
    reasons = {item["prompt_id"]: item["reason"] for item in found["skipped"]}
    assert "control token" in reasons["end in answer"] and "control token" in reasons["end in prompt"]
    assert "ZeroDivisionError: nothing to divide" in reasons["2"] and all(reasons.values())
    assert f"{len(names)} held-out rows skipped" in err
    stored = read_responses(tmp_path / "eval.parquet")
    assert {name: row["score"] is None for name, row in stored.by_prompt.items()} == {
        "0": False, "1": False, "2": True, "3": False
    }  # fmt: skip


def test_without_a_usable_row_there_is_one_sentence(tiny_model, tmp_path):
    data, _ = write_bad_rows(tmp_path / "data", good=0)
    base = [evaluate_model.main, "--model", tiny_model, "--output_file", tmp_path / "eval.json", "--max_new_tokens", 4]
    code, _, err = run_main(*base, "--input_dir", data)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "no held-out row of" in err
    data, _ = write_bad_rows(tmp_path / "data", good=3)
    code, _, err = run_main(*base, "--input_dir", data, "--metric", "tests.evaluation.test_evaluation:always_broken")
    assert code == 2 and "the metric failed on every response" in err.strip().splitlines()[-1]
    assert not (tmp_path / "eval.json").exists() and not (tmp_path / "eval.parquet").exists()


def test_every_response_is_stored(tiny_model, tmp_path):
    data, output = write_sums(tmp_path / "data"), tmp_path / "eval.json"
    code, _, err = run_main(
        *(evaluate_model.main, "--model", tiny_model, "--input_dir", data, "--output_file", output),
        *("--max_new_tokens", 4, "--limit", 5, "--samples", 1, "--temperatures", 0, 0.5, "--metric", "format"),
    )
    assert code == 0, err
    stored, result = list(read_rows(tmp_path / "eval.parquet")), json.loads(output.read_text())
    assert [row["temperature"] for row in stored] == [0.0] * 5 + [0.5] * 5
    assert len({row["prompt_id"] for row in stored}) == 5 and {row["model"] for row in stored} == {str(tiny_model)}
    encoder = ChatEncoder(load_tokenizer(tiny_model))
    for row in stored:
        assert row["response"] == encoder.decode(row["token_ids"]) and 1 <= len(row["token_ids"]) <= 4
        assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] in encoder.stop_ids)
        assert row["tokens"] == len(encoder.response_ids([
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["ground_truth"]}
        ]))  # fmt: skip
    assert result["nll"] == pytest.approx(
        sum(row["nats"] for row in stored[:5]) / sum(row["tokens"] for row in stored[:5])
    )
    assert result["temperatures"]["0.5"]["exact"] == pytest.approx(sum(row["score"] for row in stored[5:]) / 5)
    assert result["samples"][0]["responses"]["0.5"] == stored[5]["response"]


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


def word_shares(prompt: str, response: str, reference: str, words: list[str]) -> Score:
    """Whether the prompt ends with the first word, and the share of the words that it contains."""
    return Score(float(prompt.endswith(words[0])), {"words": Part(sum(word in prompt for word in words), len(words))})


def test_prompts_without_ground_truth_and_a_metric_of_several_numbers(tiny_model, tmp_path):
    lines = [
        {"prompt": "1+1", "words": ["1", "2"]},
        {"prompt": "2+1", "words": ["1", "2", "+"]},
        {"prompt": "2+2", "words": []},
    ]
    data, output = tmp_path / "data", tmp_path / "eval.json"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [evaluate_model.main, "--model", tiny_model, "--input_dir", data, "--output_file", output]
    flags += ["--max_new_tokens", 2, "--temperatures", 0]
    code, _, err = run_main(*flags, "--metric", "tests.evaluation.test_evaluation:word_shares")
    assert code == 0, err
    result, stored = json.loads(output.read_text()), read_responses(tmp_path / "eval.parquet")
    found = result["temperatures"]["0"]
    assert result["n"] == 3 and "nll" not in result and "identical_rate" not in found
    # The third prompt cannot be scored: it is named, and counts in neither number.
    assert len(result["skipped"]) == 1 and "IndexError" in result["skipped"][0]["reason"]
    assert found["exact"] == 1.0 and found["parts"]["words"]["value"] == 4 / 5 and found["parts"]["words"]["n"] == 2
    assert found["parts"]["words"]["value_se"] == pytest.approx(
        0.24
    )  # residuals -0.6 and 0.6, over 2.5 words per prompt
    assert {len(row["parts"] or []) for row in stored.by_prompt.values()} == {0, 1}
    assert all(row["nats"] is None and row["ground_truth"] is None for row in stored.by_prompt.values())
    code, _, err = run_main(*flags, "--metric", "math_answer")
    assert code == 2 and "no held-out row of" in err


@pytest.mark.parametrize(
    ("data", "output", "sentence"),
    [
        ("data", "data/eval.json", "is in the place of the data"),
        ("data/test.parquet", "data/test.json", "is in the place of the data"),  # its responses would replace the data
        ("data/test.jsonl", "data/../data/test.jsonl", "is in the place of the data"),
        ("data", "eval.parquet", "the name of the responses' file: give a name such as eval.json"),
    ],
)
def test_data_and_responses_are_never_overwritten(tmp_path, monkeypatch, data, output, sentence):
    monkeypatch.chdir(tmp_path)
    write_sums(tmp_path / "data")
    (tmp_path / "data" / "test.parquet").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    code, _, err = run_main(evaluate_model.main, "--model", "m", "--input_dir", data, "--output_file", output)
    assert code == 2 and sentence in err and {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--metric", "no_such_module:f"], "no_such_module"),
        (["--metric", "bleu"], "unknown metric 'bleu'"),
        (["--temperatures", "-1"], "temperatures is -1"),
        (["--temperatures", "1", "1"], "give one or more, each once"),
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
