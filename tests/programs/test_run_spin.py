"""The training program, for real, on tiny random models: killed, resumed, and given bad settings."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from spin import run_spin
from spin.alignment.core.content_hash import sealed_file
from tests.helpers import REPOSITORY, program_environment, run_main, run_script, save_tiny_model
from tests.helpers.training import difference, is_saved, metrics, train, weights, write_config


def test_training_moves_apart_what_it_should(reference_run, tiny_model):
    record = metrics(reference_run)
    assert record["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record["steps"] == 12
    assert record["pairs"] == {"train": 24, "test": 6}
    final = record["final"]
    assert final["rewards/margins"] > 0.05
    assert final["rewards/accuracies"] > 0.5
    assert final["eval_rewards/margins"] == pytest.approx(
        final["eval_rewards/chosen"] - final["eval_rewards/rejected"], abs=1e-6
    )
    assert final["logps/chosen"] < 0
    assert difference(reference_run, tiny_model) > 1e-3


def test_a_finished_training_is_not_repeated_and_a_changed_one_refused(reference_run):
    config = reference_run.parent / "c.yaml"
    before = (reference_run / "model.safetensors").stat().st_mtime_ns
    assert "already complete" in train(config)
    assert (reference_run / "model.safetensors").stat().st_mtime_ns == before
    code, _, error = run_main(run_spin.main, config, "--beta=0.2")
    assert code == 2
    assert "beta differ" in error


def test_the_saved_policy_loads_by_itself(reference_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(reference_run)
    tokenizer = AutoTokenizer.from_pretrained(reference_run)
    assert tokenizer.chat_template
    assert model.config.vocab_size == len(tokenizer)
    assert "spin_packed" not in (reference_run / "config.json").read_text()
    assert not list(reference_run.glob("**/*.bin.tmp"))


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(reference_run, tiny_model, pairs, tmp_path):
    settings = {
        "num_train_epochs": 2,
        "dataset_splits": ["train_prefs", "test_prefs"],
        "save_strategy": "steps",
        "save_steps": 3,
    }
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, **settings)
    command = [sys.executable, "spin/run_spin.py", str(config)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=program_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    out, deadline = tmp_path / "out", time.monotonic() + 120
    while not is_saved(out / "checkpoint-3") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "metrics.json").exists()
    torn = out / "checkpoint-11"  # as if the kill had come while the next checkpoint was written
    torn.mkdir(exist_ok=True)
    assert "resuming from" in train(config)
    assert difference(out, reference_run) == 0.0
    assert not torn.exists() or (torn / "trainer_state.json").exists()
    assert metrics(out)["first_loss"] == metrics(reference_run)["first_loss"]


def test_a_resume_from_the_last_checkpoint_takes_no_further_step(tiny_model, pairs, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, max_steps=3, save_strategy="steps", save_steps=1)
    train(config)
    before, record = weights(tmp_path / "out"), metrics(tmp_path / "out")
    for name in ("metrics.json", "config.json"):
        (tmp_path / "out" / name).unlink()
    assert "resuming from" in train(config)
    found, again = weights(tmp_path / "out"), metrics(tmp_path / "out")
    assert all((before[name] == found[name]).all() for name in before)
    for name in ("steps", "train_loss", "completion_tokens", "accounting"):
        assert again[name] == record[name], name


@pytest.mark.slow
def test_accumulation_gives_the_same_weights(reference_run, tiny_model, pairs, tmp_path):
    config = write_config(
        tmp_path / "c.yaml",
        tiny_model,
        pairs,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    train(config)
    assert difference(tmp_path / "out", reference_run) < 2e-5


def test_a_foreign_reference_stops_before_the_first_step(tiny_model, pairs, tmp_path):
    """The guard: stored log-probs that are not this model's are noticed although their key fits."""
    import pyarrow as pa

    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, max_steps=1, reference_dir=str(tmp_path / "ref"))
    train(config)
    (store,) = (tmp_path / "ref").glob("*.arrow")
    table = pa.ipc.open_file(str(store)).read_all()
    shifted = [[value - 1.0 for value in row] for row in table.column("chosen").to_pylist()]
    table = table.set_column(1, table.schema.field("chosen"), pa.array(shifted, pa.list_(pa.float32())))
    with sealed_file(store) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    shutil.rmtree(tmp_path / "out")
    done = run_script("spin/run_spin.py", config)
    assert done.returncode == 1
    assert "nats per token before the first step" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


BAD = {
    "unknown key": ({"betta": 0.1}, "unknown key 'betta' in .*did you mean 'beta'"),
    "unknown loss": ({"loss_type": "dpo"}, "unknown loss_type 'dpo': choose one of hinge, ipo, sigmoid"),
    "beta zero": ({"beta": 0}, "beta is 0.0: set it to a number above 0"),
    "beta text": ({"beta": "strong"}, "'beta' in .* is 'strong', which is not a number"),
    "smoothing": ({"label_smoothing": 0.7}, "label_smoothing is 0.7"),
    "smoothing with hinge": ({"loss_type": "hinge", "label_smoothing": 0.1}, "loss_type hinge does not use it"),
    "token smoothing": ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
    "lengths": ({"max_prompt_length": 128}, "max_prompt_length is 128 and max_length 128"),
    "both precisions": ({"bf16": True, "fp16": True}, "are incompatible with each other"),
    "no data": ({"dataset_mixer": {}}, "lacks the key 'dataset_mixer'"),
    "missing data": ({"dataset_mixer": {"./nowhere": 1.0}}, r"\./nowhere does not exist"),
    "fraction": ({"dataset_mixer": {"PAIRS": 1.5}}, "the fraction 1.5: set it above 0 and at most 1"),
    "missing model": ({"model_name_or_path": "./nowhere"}, r"model folder ./nowhere does not exist"),
    "no model": ({"model_name_or_path": ""}, "model_name_or_path is missing"),
    "no output": ({"output_dir": None}, "lacks the key 'output_dir'"),
    "quantised without adapters": ({"load_in_4bit": True}, "set use_peft to true"),
    "both quantisations": ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "choose one"),
    "unknown split": ({"dataset_splits": ["validation"]}, "validation"),
    "no training split": ({"dataset_splits": ["test_prefs"]}, "add a training split"),
    "removed key": ({"lora_dropout": 0.1}, "the key 'lora_dropout' .* is not supported"),
    "old and new key": ({"eval_strategy": "no", "evaluation_strategy": "no"}, "keep 'eval_strategy'"),
    "dtype": ({"dtype": "float8"}, "choose one of auto, float32, bfloat16, float16"),
    "fp16 on a CPU": ({"fp16": True}, "fp16 is true, but no GPU is available"),
    "negative rate": ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    "random start": ({"init_from_config": True}, "init_from_config cannot be used here"),
    "unused columns": ({"remove_unused_columns": True}, "remove the key"),
    "pushing offline": ({"push_to_hub": True}, "HF_HUB_OFFLINE is set"),
    "pushing each checkpoint": ({"push_to_hub": True, "hub_strategy": "every_save"}, "set it to end"),
    "noise": ({"neftune_noise_alpha": 5.0}, "noise makes the policy differ from its reference"),
    "half evaluation": ({"bf16_full_eval": True}, "the same precision as the stored log-probs"),
    "grouped by length": ({"train_sampling_strategy": "group_by_length"}, "set it to random or sequential"),
    "evaluation without data": ({"eval_strategy": "epoch"}, "names no test split: add test_prefs"),
    "everything cut away": (
        {"max_length": 3, "max_prompt_length": 2, "resume_from_checkpoint": "./no"},
        "not a complete checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_end_in_one_sentence(case, tiny_model, pairs, tmp_path):
    settings, message = BAD[case]
    if "dataset_mixer" in settings:
        settings = {
            "dataset_mixer": {str(pairs) if key == "PAIRS" else key: v for key, v in settings["dataset_mixer"].items()}
        }
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, **settings)
    code, _, error = run_main(run_spin.main, config)
    assert code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "arguments, message", [((), "the configuration file is missing"), (("none.yaml",), "does not exist")]
)
def test_a_missing_configuration(arguments, message):
    code, _, error = run_main(run_spin.main, *arguments)
    assert code == 2
    assert message in error


def test_help_is_quick():
    started = time.monotonic()
    code, out, _ = run_main(run_spin.main, "--help")
    assert code == 0
    assert "dataset_mixer" in out
    assert time.monotonic() - started < 0.5


def test_the_finished_model_is_pushed_when_asked(tiny_model, pairs, tmp_path, monkeypatch):
    import huggingface_hub

    from spin.alignment.training.run import push_policy
    from spin.alignment.training.settings import read_settings
    from spin.alignment.training.trainer import SPINConfig

    calls = []

    class Hub:
        def __init__(self, token):
            self.token = token

        def create_repo(self, name, **settings):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{name}")

        def upload_folder(self, **settings):
            calls.append(settings)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    values = yaml.safe_load(write_config(tmp_path / "c.yaml", tiny_model, pairs, push_to_hub=True).read_text())
    settings = read_settings(values, "c.yaml", SPINConfig)
    assert not settings.arguments.push_to_hub  # the Trainer itself pushes nothing
    out = save_tiny_model(tmp_path / "out")
    (out / "optimizer.pt").write_text("x")
    push_policy(settings)
    assert [(call["repo_id"], call["folder_path"]) for call in calls] == [("someone/out", tmp_path / "out")]
    assert "model.safetensors" in calls[0]["allow_patterns"] and "optimizer.pt" not in calls[0]["allow_patterns"]
