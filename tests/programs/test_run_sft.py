"""The SFT program, for real: what it learns from, where it starts, resuming, adapters and bad input."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin import run_sft
from spin.alignment.core.config import load_config
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.training.settings import read_settings
from spin.alignment.training.sft import SFTArguments
from spin.alignment.training.sft_data import load_ground_truth
from spin.alignment.training.sft_rows import with_labels
from tests.helpers import run_main
from tests.helpers.runs import write_sums

PROMPTS = 16


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write_sums(tmp_path_factory.mktemp("sums"), num_train=PROMPTS)


def write_config(folder: Path, model: Path, data: Path, **settings) -> Path:
    """Two epochs over the prompts in eight steps; a setting of None removes the key."""
    values = {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(data): 1.0},
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 64,
        "max_prompt_length": 32,
        "disable_tqdm": True,
    } | settings
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def train(config: Path, *arguments: str) -> Path:
    code, _, err = run_main(run_sft.main, config, *arguments)
    assert code == 0, err
    return Path(yaml.safe_load(config.read_text())["output_dir"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def same(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def smoothed_loss(model_folder: Path, data: Path, smoothing: float) -> float:
    """The mean over all response tokens of (1 - e) * NLL + e * (mean over the vocabulary of -log p)."""
    model, encoder = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        ChatEncoder(AutoTokenizer.from_pretrained(model_folder)),
    )
    losses = []
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        prompt, response = encoder.prompt_ids(turns[:1]), encoder.response_ids(turns)
        with torch.no_grad():
            logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll = -logps.gather(1, torch.tensor(response)[:, None])[:, 0]
        losses.append((1 - smoothing) * nll - smoothing * logps.mean(-1))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_is_that_of_the_response_tokens_alone(tiny_model, sums, tmp_path, smoothing, accumulation):
    config = write_config(
        tmp_path,
        tiny_model,
        sums,
        label_smoothing_factor=smoothing,
        per_device_train_batch_size=PROMPTS // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
    )
    first = metrics(train(config))["history"][0]
    assert first["loss"] == pytest.approx(smoothed_loss(tiny_model, sums, smoothing), abs=1e-4)


def test_prompts_are_those_of_generation_and_carry_no_loss(tiny_model, sums, tmp_path):
    values = load_config(write_config(tmp_path, tiny_model, sums, dataset_splits=["train"]))
    settings = read_settings(values, "sft.yaml", SFTArguments)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model))
    train = load_ground_truth(settings, encoder)["train"]
    row = train.rows[0]
    prompt = encoder.prompt_ids([{"role": "user", "content": "0+1"}])
    answer = encoder.response_ids([{"role": "user", "content": "0+1"}, {"role": "assistant", "content": "1"}])
    assert (row["prompt_ids"], row["response_ids"]) == (prompt, answer) and row["source"] == str(sums)
    labelled = with_labels(row)
    assert labelled["input_ids"] == prompt + answer
    assert labelled["labels"] == [-100] * len(prompt) + answer
    assert answer.count(encoder.end_id) == 1
    assert not train.account.dropped and train.account.rows == len(train.rows)


def test_training_lowers_the_loss_and_the_model_loads_by_itself(tiny_model, sums, tmp_path):
    config = write_config(tmp_path, tiny_model, sums, dataset_splits=["train", "test"], learning_rate=1e-2)
    out = train(config)
    record = metrics(out)
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert record["steps"] == 8
    assert record["rows"] == {"train": PROMPTS, "test": 8}
    assert record["final"]["eval_loss"] > 0
    assert (out / "generation_config.json").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert not same(out, tiny_model)
    assert model.config.vocab_size == len(tokenizer)


@pytest.fixture(scope="module")
def finished(tiny_model, sums, tmp_path_factory):
    """A training with checkpoints after steps 3 and 6 of 8."""
    config = write_config(
        tmp_path_factory.mktemp("finished"), tiny_model, sums, save_strategy="steps", save_steps=3, logging_steps=2
    )
    train(config)
    return config


def test_a_killed_training_goes_on_to_the_same_weights(finished, tmp_path):
    out = Path(yaml.safe_load(finished.read_text())["output_dir"])
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    shutil.rmtree(killed / "checkpoints" / "checkpoint-8", ignore_errors=True)
    for name in ("metrics.json", "config.json", "model.safetensors"):
        (killed / name).unlink()
    (killed / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it wrote this one
    code, said, err = run_main(run_sft.main, finished, f"--output_dir={killed}")
    assert code == 0, err
    assert "resuming from" in said and "checkpoint-3" in said
    assert same(killed, out)


def test_a_resume_from_the_last_checkpoint_takes_no_further_step(tiny_model, sums, tmp_path):
    """Killed while the model was saved, after the last checkpoint, which is in the middle of an epoch."""
    config = write_config(tmp_path, tiny_model, sums, max_steps=3, save_strategy="steps", save_steps=1)
    out = train(config)
    before, record = weights(out), metrics(out)
    for name in ("metrics.json", "config.json"):
        (out / name).unlink()
    train(config)
    assert all(torch.equal(before[name], found) for name, found in weights(out).items())
    again = metrics(out)
    assert again["steps"] == 3 and again["accounting"] == record["accounting"]
    assert again["train_loss"] == record["train_loss"] == again["history"][-1]["train_loss"]
    assert [entry.get("num_tokens") for entry in again["history"]] == [
        entry.get("num_tokens") for entry in record["history"]
    ]


def test_a_finished_training_is_not_repeated_and_a_changed_one_refused(finished):
    out = Path(yaml.safe_load(finished.read_text())["output_dir"])
    before = (out / "metrics.json").stat().st_mtime_ns
    code, said, _ = run_main(run_sft.main, finished)
    assert code == 0 and "already complete" in said
    code, _, err = run_main(run_sft.main, finished, "--learning_rate=2e-3")
    assert code == 2 and "learning_rate" in err and "overwrite_output_dir" in err
    assert (out / "metrics.json").stat().st_mtime_ns == before


def test_random_start_depends_on_the_seed_alone(tiny_model, sums, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    results = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, bare, sums, init_from_config=True, seed=seed, max_steps=1)
        results.append(train(config))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_adapters_are_merged_before_saving(tiny_model, sums, tmp_path):
    config = write_config(
        tmp_path, tiny_model, sums, use_peft=True, lora_r=4, lora_target_modules=["q_proj"], learning_rate=1e-2
    )
    out = train(config)
    assert not (out / "adapter_config.json").exists()
    changed = [name for name, value in weights(out).items() if not torch.equal(value, weights(tiny_model)[name])]
    assert changed and all("q_proj" in name for name in changed)


def test_adapters_learn_the_same_with_recomputed_activations(tiny_model, sums, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "max_steps": 2}
    runs = {
        "kept": {},
        "recomputed": {"gradient_checkpointing": True},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }
    folders = []
    for name, settings in runs.items():
        (tmp_path / name).mkdir()
        folders.append(train(write_config(tmp_path / name, tiny_model, sums, **lora, **settings)))
    kept, *others = map(weights, folders)
    for other in others:
        assert all(torch.allclose(kept[name], other[name], atol=1e-6) for name in kept)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rat": 1e-3}, "unknown key 'learning_rat'.*learning_rate"),
        ({"beta": 0.1}, "unknown key 'beta'"),
        ({"packing": True}, "packing"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"model_name_or_path": "./nowhere"}, "nowhere does not exist"),
        ({"dataset_mixer": {"./nowhere": 1.0}}, "nowhere"),
        ({"dataset_mixer": None}, "dataset_mixer"),
        ({"output_dir": None}, "output_dir"),
        ({"dataset_splits": ["test"]}, "add a training split"),
        ({"dataset_splits": ["validation"]}, "validation"),
        ({"max_length": 8, "max_prompt_length": 8}, "max_prompt_length must be smaller than max_length"),
        ({"learning_rate": "fast"}, "learning_rate.*'fast'"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(tiny_model, sums, tmp_path, monkeypatch, settings, said):
    monkeypatch.setattr("spin.alignment.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    code, _, err = run_main(run_sft.main, write_config(tmp_path, tiny_model, sums, **settings))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(said, err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0, 1.5, -1])
def test_a_share_of_a_data_set_lies_between_0_and_1(tiny_model, sums, tmp_path, fraction):
    config = write_config(tmp_path, tiny_model, sums, dataset_mixer={str(sums): fraction})
    code, _, err = run_main(run_sft.main, config)
    assert code == 2 and "above 0 and at most 1" in err


def test_a_model_without_weights_needs_to_be_asked_for(tiny_model, sums, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    code, _, err = run_main(run_sft.main, write_config(tmp_path, bare, sums))
    assert code == 2 and "no weights" in err


def test_rows_that_cannot_be_encoded_are_counted(tiny_model, tmp_path):
    rows = [{"prompt": f"{number}+1", "response": answer} for number, answer in enumerate(["1", "<|im_end|>", "3"])]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = metrics(train(write_config(tmp_path, tiny_model, data, max_steps=1)))
    assert record["rows"] == {"train": 2}
    assert list(record["dropped"].values()) == [1]


def test_the_best_checkpoint_becomes_the_model(tiny_model, sums, tmp_path):
    """With load_best_model_at_end, training stops where held-out NLL is lowest; a rate that is far too high makes it rise."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    config = write_config(
        *(tmp_path, tiny_model, sums),
        dataset_splits=["train", "test"],
        learning_rate=0.5,
        lr_scheduler_type="constant",
        **settings,
    )
    out = train(config)
    losses = {entry["step"]: entry["eval_loss"] for entry in metrics(out)["history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert set(losses) == {1, 2, 3} and best < 3
    kept = out / "checkpoints"
    assert same(out, kept / f"checkpoint-{best}") and not same(out, kept / "checkpoint-3")
