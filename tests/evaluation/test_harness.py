"""Benchmarks of lm-evaluation-harness: names, results, and real tasks made from local data, run on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.harness import PRESETS, Task, main_metric, parse_tasks, task_manager, task_result
from spin.alignment.evaluation.statistics import Z95
from tests.helpers import run_main
from tests.helpers.runs import write_sums


def test_names_and_presets():
    found = parse_tasks(["open_llm_leaderboard", "ifeval", "arc_easy=3", "local"])
    assert [(task.name, task.shots) for task in found] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("truthfulqa_mc2", 0), ("mmlu", 5), ("winogrande", 5), ("gsm8k", 5),
        ("ifeval", 0), ("arc_easy", 3), ("local", None),
    ]  # fmt: skip
    for names, sentence in ((["a=x"], "write TASK=SHOTS"), (["a=-1"], "whole number"), (["gsm8k", "gsm8k=8"], "twice")):
        with pytest.raises(InputError, match=sentence):
            parse_tasks(names)


def test_the_results_of_the_harness_are_read():
    numbers = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_norm,none": 0.4,
        "acc_norm_stderr,none": 0.05,
    }
    results = {"results": {"arc": numbers}, "n-shot": {"arc": 3}, "n-samples": {"arc": {"original": 9, "effective": 6}}}
    found = task_result(Task("arc", None), results)
    assert (found["metric"], found["value"], found["value_se"], found["shots"], found["n"]) == (
        "acc_norm",
        0.4,
        0.05,
        3,
        6,
    )
    assert found["value_interval"] == [0.4 - Z95 * 0.05, 0.4 + Z95 * 0.05] and found["all"] == {
        "acc": 0.5,
        "acc_norm": 0.4,
    }
    assert task_result(Task("arc", 25, "acc"), results)["value"] == 0.5
    numbers |= {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}
    found = task_result(Task("arc", 5, "exact_match,strict-match"), results)
    assert found["value"] == 0.25 and "value_se" not in found
    assert main_metric({"f1": 1.0, "exact_match,flexible-extract": 0.5}) == "exact_match,flexible-extract"


def test_without_the_package_there_is_one_sentence(tiny_model, tmp_path, monkeypatch):
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else whole(name, *a))
    assert "selfplay-spin[eval]" in evaluate(tiny_model, tmp_path, "--tasks", "ifeval", code=2)


def evaluate(model, folder, *flags, code=0):
    base = ("--model", model, "--input_dir", write_sums(folder / "data"), "--output_file", folder / "out" / "eval.json")
    found, out, err = run_main(
        cli.main, "eval", *base, "--max_new_tokens", 2, "--limit", 2, "--temperatures", 0, *flags
    )
    assert found == code, err
    return out if code == 0 else err


def write_tasks(folder, rows, questions):
    """A task with free answers, and one with choices."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    shared |= {"test_split": "test", "fewshot_split": "test", "metadata": {"version": 1.0}, "doc_to_text": questions}
    free = {"task": "spin_free", "output_type": "generate_until", "doc_to_target": "x", "num_fewshot": 1}
    free |= {"generation_kwargs": {"until": ["?"], "do_sample": False, "max_gen_toks": 4}}
    free |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    choice = {
        "task": "spin_choice",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_choice": ["a", "bb", "ccc"],
    }
    choice |= {"doc_to_target": 0, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    for task in (free, choice):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval", reason="pip install 'selfplay-spin[eval]'")


@pytest.mark.parametrize("data", ["gsm8k", "ifeval"])
def test_local_tasks_on_a_tiny_model(harness, request, tmp_path, tiny_model, gsm8k, data):
    path = {"gsm8k": gsm8k / "test.jsonl", "ifeval": gsm8k.parent / "ifeval" / "input_data.jsonl"}[data]
    rows = [json.loads(line) for line in path.read_text().splitlines()[:12]]
    key = {"gsm8k": "question", "ifeval": "prompt"}[data]
    # The tiny model reads 512 characters.
    rows = [{"text": row[key][:100]} for row in rows]
    tasks = write_tasks(tmp_path / "tasks", rows, "{{text}}")
    flags = ("--task_dir", tasks, "--task_limit", 8, "--tasks", "spin_free=0", "spin_choice")
    assert "spin_choice (0-shot): acc" in evaluate(tiny_model, tmp_path, *flags)
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    assert found["spin_free"]["value"] == 0.0 and found["spin_free"]["shots"] == 0 and found["spin_free"]["n"] == 8
    right = sum(own_choice(tiny_model, row["text"]) == 0 for row in rows[:8])
    assert found["spin_choice"]["value"] == right / 8
    # The harness's error of a mean: s / sqrt(n), with n - 1 in s.
    share = right / 8
    assert found["spin_choice"]["value_se"] == pytest.approx(math.sqrt(share * (1 - share) / 7))
    assert "spin_nothing, which lm-evaluation-harness does not have" in evaluate(
        tiny_model, tmp_path, "--tasks", "spin_nothing", "--task_dir", tasks, code=2
    )


def own_choice(model, text):
    """The choice with the highest log-likelihood after the text and a space, by a plain forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    sums = []
    for choice in ("a", "bb", "ccc"):
        start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(f"{text} {choice}", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logps = network(ids).logits[0].log_softmax(-1)
        sums.append(sum(logps[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
    return max(range(3), key=sums.__getitem__)


def test_presets_are_tasks_of_the_harness(harness):
    known = {*task_manager(None).all_tasks}
    assert {name for tasks in PRESETS.values() for name, *_ in tasks} <= known
