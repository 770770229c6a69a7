"""The plan of a run, and its checks before the start."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest

from spin import cli
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.lineage import lineage
from spin.alignment.pipeline.preflight import precision_remark
from spin.alignment.pipeline.program_settings import train_values
from spin.alignment.pipeline.runner import Pipeline
from spin.alignment.pipeline.stages import make_stages
from tests.helpers import REPOSITORY, char_tokenizer, run_main
from tests.helpers.runs import TRAINING, tiny_run, write_config

FAST = {"max_steps": 1, "use_cpu": True}


def make_config(tmp_path, **changes):
    return load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes)))


def test_a_float32_start_of_bfloat16_training_is_remarked_on(tmp_path):
    from types import SimpleNamespace

    start, half = SimpleNamespace(dtype="float32"), SimpleNamespace(dtype="bfloat16")
    trained = SimpleNamespace(dtype="float32", trained_in_dtype="bfloat16")
    config = make_config(tmp_path)
    assert config.sft is None and precision_remark(config, start) == ""
    config = dataclasses.replace(config, train={**config.train, "bf16": True})
    sentence = f"{config.model} has float32 weights and is used in float32, but the models trained from it in bfloat16"
    remark = precision_remark(config, start)
    assert remark.startswith(sentence) and "set generate.dtype and evaluate.dtype to bfloat16" in remark
    assert precision_remark(config, half) == precision_remark(config, trained) == ""
    half_set = dataclasses.replace(config, generate={**config.generate, "dtype": "bfloat16"})
    assert "set evaluate.dtype to bfloat16" in precision_remark(half_set, start)
    all_set = dataclasses.replace(half_set, evaluate={**config.evaluate, "dtype": "float32"})
    assert precision_remark(all_set, start) == ""


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_of_two_iterations_with_start_and_control(tmp_path):
    config = make_config(tmp_path, sft=FAST, control=FAST)
    names = [stage.name for stage in make_stages(config)]
    steps = ["generate", "convert", "train", "evaluate"]
    assert names == [
        *("sft/train", "sft/evaluate", "control/train", "control/evaluate"),
        *(f"iter{t}/{step}" for t in (0, 1) for step in steps),
    ]


def test_lineage_says_who_plays_whom_and_on_which_data(tmp_path):
    rows = lineage(make_config(tmp_path, sft=FAST, iterations=3, history=1))
    assert rows[1:] == [
        ("iter0/checkpoint", "sft/checkpoint", "sft/checkpoint", "iter0/pairs"),
        ("iter1/checkpoint", "iter0/checkpoint", "iter0/checkpoint", "iter1/pairs + iter0/pairs"),
        ("iter2/checkpoint", "iter1/checkpoint", "iter1/checkpoint", "iter2/pairs + iter1/pairs"),
    ]


def test_each_iteration_trains_from_its_opponent_with_its_overrides(tmp_path):
    config = make_config(tmp_path, history=0)
    first, second = train_values(config, 0), train_values(config, 1)
    assert first["model_name_or_path"] == str(tmp_path / "model") and "beta" not in first
    assert second["model_name_or_path"] == str(tmp_path / "run" / "iter0" / "checkpoint") and second["beta"] == 1.0
    assert list(second["dataset_mixer"]) == [str(tmp_path / "run" / "iter1" / "pairs")]


def test_one_command_makes_all_fractions_and_iterations_differ_in_their_seed(tmp_path):
    stages = {stage.name: stage for stage in make_stages(make_config(tmp_path))}
    (command,) = stages["iter0/generate"].commands  # the model is loaded once
    assert "--data_frac=auto" in command
    assert [path.name for path in stages["iter0/generate"].outputs()] == ["train-00000.parquet", "train-00001.parquet"]
    seeds = {stages[f"iter{t}/generate"].settings["seed"] for t in (0, 1)}
    assert len(seeds) == 2


def test_train_section_may_extend_a_configuration_file(tmp_path):
    base = write_config(tmp_path / "base.yaml", {"beta": 0.3, "max_steps": 9})
    values = train_values(make_config(tmp_path, train={"config": str(base), "max_steps": 2}), 0)
    assert values["beta"] == 0.3 and values["max_steps"] == 2 and "config" not in values


@pytest.mark.parametrize("name", ["demo.yaml", "zephyr_7b.yaml"])
def test_shipped_runs_are_read_and_planned(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = load_run_config(f"configs/{name}")
    assert make_stages(config) and lineage(config)


def test_paper_run_has_the_settings_of_its_later_iterations(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = load_run_config("configs/zephyr_7b.yaml")
    rates = [(values["learning_rate"], values["beta"]) for values in (train_values(config, step) for step in range(4))]
    assert rates == [(5e-7, 0.1), (5e-7, 0.1), (1e-7, 0.1), (1e-7, 5.0)]
    revisions = [values.get("model_revision") for values in (train_values(config, step) for step in range(2))]
    assert revisions == [config.model_revision, None]
    assert train_values(config, 1)["dataset_splits"] == ["train_sft_prefs"]


# --- bad configurations: one sentence, exit code 2, nothing written -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"iteration": 3}, "unknown key 'iteration'.*did you mean 'iterations'"),
        ({"iterations": 0}, "iterations is 0: set it to 1 or more"),
        ({"history": -1}, "history is -1"),
        ({"overrides": {"1": {"beta": 0.5}, "01": {"beta": 0.7}}}, "names an iteration twice, as in 1 and 01"),
        (
            {"generate": {"system": "fold"}},
            "'system' in the section 'train' of .* is keep, but fold in the section 'generate'",
        ),
        ({"model": None}, "lacks the key 'model'"),
        ({"model": "./nowhere"}, "nowhere does not exist"),
        ({"data": {"train": "./no-data"}}, "no-data"),
        (
            {"generate": {"temprature": 1}},
            "unknown key 'temprature' in the section 'generate'; did you mean 'temperature'",
        ),
        ({"generate": {"temperature": -1}}, "temperature is -1.*in the section 'generate'"),
        (
            {"generate": {"backend": "jax"}},
            "unknown generation backend 'jax': choose one of openai, transformers, vllm",
        ),
        ({"generate": {"frac_len": -5}}, "frac_len is -5"),
        ({"generate": {"model": "x"}}, "'model' in the section 'generate' is set by the pipeline itself"),
        ({"convert": {"identical": "maybe"}}, "maybe"),
        ({"train": {**TRAINING, "learning_rat": 1}}, "unknown key 'learning_rat'.*did you mean 'learning_rate'"),
        ({"train": {**TRAINING, "loss_type": "sigmoidal"}}, "sigmoidal"),
        ({"train": {**TRAINING, "config": "configs/none.yaml"}}, "none.yaml does not exist"),
        ({"overrides": {1: {"betta": 1}}}, "unknown key 'betta'.*iteration 1"),
        ({"overrides": {7: {"beta": 1}}}, "overrides names the iteration 7, but the run has 0 to 1"),
        ({"sft": {"optimizer": "x"}}, "unknown key 'optimizer'.*section 'sft'"),
        ({"evaluate": {"metric": "bleu"}}, "unknown metric 'bleu': choose one of exact_match, format"),
        ({"data": {"train": "data", "train_split": "test"}}, "data.train_split is test"),
        ({"launch": {"num_processes": 0}}, "num_processes is 0"),
        ({"launch": {"config_file": "no.yaml"}}, "no.yaml does not exist"),
        ({"launch": {"num_processes": 2, "parallel": True}}, "launch.parallel"),
    ],
)
def test_bad_configuration_is_one_sentence(tmp_path, changes, sentence):
    path = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes))
    code, _, err = run_main(cli.main, "run", path)
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert re.search(sentence, err), err
    assert not (tmp_path / "run").exists()


def test_template_is_tried_before_anything_starts(tmp_path):
    values = tiny_run(tmp_path)
    char_tokenizer(template=None).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    code, _, err = run_main(cli.main, "run", write_config(tmp_path / "config.yaml", values))
    assert code == 2 and "no chat template" in err


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    code, _, err = run_main(cli.main, "run", write_config(tmp_path / "config.yaml", tiny_run(tmp_path)))
    assert code == 2 and "thesis.tex" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_killed_while_it_first_wrote_its_manifest_can_be_started_again(tmp_path, monkeypatch):
    """What it leaves is its lock and half a manifest, which are no foreign files, and which the next run removes."""
    run_dir = tmp_path / "run"
    kill = "import os, sys, signal; import spin.alignment.core.files as files; from spin import cli\n"
    kill += "files.fsync_folder = lambda folder: None\n"
    kill += "files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\ncli.main(sys.argv[1:])\n"
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", kill, "run", str(config)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in run_dir.iterdir())
    assert left[0] == ".lock" and left[1].startswith(".manifest.json.") and left[1].endswith(".tmp") and len(left) == 2
    monkeypatch.setattr(Pipeline, "run", lambda line: None)
    run_main(cli.main, "run", config)
    assert sorted(path.name for path in run_dir.iterdir()) == ["manifest.json", "run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "command is missing"),
        (["rum"], "unknown command 'rum'"),
        (["status", "nowhere"], "contains no run"),
        (["report", "nowhere"], "contains no run"),
        (["diff", "nowhere", "elsewhere"], "contains no run"),
        (["validate", "nowhere"], "does not exist"),
        (["run"], "configuration file is missing"),
        (["run", "nowhere.yaml"], "does not exist"),
        (["run", "nowhere.yaml", "beta=1"], "does not exist"),
    ],
)
def test_bad_command_lines(arguments, word):
    code, _, err = run_main(cli.main, *arguments)
    assert code == 2 and word in err


def test_help_is_light():
    code = "import sys, spin.cli; sys.exit(bool({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
