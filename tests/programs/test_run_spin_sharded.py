"""The training program with two processes and with adapters: the weights of one process."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch

from spin import run_spin
from tests.helpers import run_command, run_main, run_script
from tests.helpers.training import (
    TWO_PROCESSES,
    difference,
    late_margin,
    launcher,
    metrics,
    train,
    weights,
    write_config,
    write_pairs,
)

ALPHA = {"alpha": 2.0, "beta": 0.5}
LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
WEIGHTED = {"plain": {"beta": 0.5}, "kl": ALPHA, "padded": ALPHA | {"batching": "padded"}, "adapters": ALPHA | LORA}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO_PROCESSES)
def test_two_processes_give_the_same_weights_as_one(reference_run, tiny_model, pairs, tmp_path, kind):
    # The six held-out pairs are three batches of two: in the second round, one process has nothing but fillers.
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    splits = ["train_prefs", "test_prefs"]
    config = write_config(tmp_path / "c.yaml", tiny_model, pairs, dataset_splits=splits, **settings)
    # What a killed build of DeepSpeed's inference kernels leaves in the user's cache must stop nobody.
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    # One or two pairs fit: the processes have different numbers of micro-batches and must wait for each other.
    train(config, "--max_tokens_per_batch=90", launch=launcher(*TWO_PROCESSES[kind]), **environment)
    ours, theirs = metrics(tmp_path / "out"), metrics(reference_run)
    losses, expected = ([entry["loss"] for entry in record["history"] if "loss" in entry] for record in (ours, theirs))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses == pytest.approx(expected, abs=2e-5)
    assert difference(tmp_path / "out", reference_run) < 1e-4
    held_out = [
        name for name in theirs["final"] if name.startswith("eval_") and "second" not in name and "time" not in name
    ]
    assert "eval_loss" in held_out and "eval_rewards/margins" in held_out
    assert [ours["final"][name] for name in held_out] == pytest.approx(
        [theirs["final"][name] for name in held_out], abs=2e-4
    )


@pytest.fixture(scope="module")
def weighted(tiny_model, tmp_path_factory):
    """Pairs with token weights, and policies trained on them in one process: plain, with the KL term, and with adapters too."""
    folder = tmp_path_factory.mktemp("weighted")
    pairs = write_pairs(folder / "pairs", weights=True)
    for name, changes in WEIGHTED.items():
        (folder / name).mkdir()
        code, _, error = run_main(run_spin.main, write_config(folder / name / "c.yaml", tiny_model, pairs, **changes))
        assert code == 0, error
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_sharded_token_weights_and_kl_term(weighted, tiny_model, tmp_path, kind):
    """The weights of one process, also when a run with the KL term resumes: its reference is the start, not the checkpoint."""
    two, runs = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}, []
    for name, changes in WEIGHTED.items():
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name / "c.yaml", tiny_model, weighted / "pairs", **changes | two)
        runs += [(kind, str(config), 3)] * (name == "kl") + [(kind, str(config), 0)]
    done = run_command([sys.executable, "-m", "tests.helpers.sharded", "run_spin", json.dumps(runs)], timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("resuming from") == 1
    for name in WEIGHTED:
        assert difference(tmp_path / name / "out", weighted / name / "out") < 1e-5, name
    assert difference(weighted / "plain/out", weighted / "kl/out") > 1e-4


@pytest.fixture(scope="module")
def adapter_run(tiny_model, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    train(write_config(folder / "c.yaml", tiny_model, pairs, use_peft=True, lora_r=4, learning_rate=1e-2))
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_sharded_adapters_are_merged_as_in_one_process(adapter_run, tiny_model, pairs, tmp_path, kind):
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    train(
        write_config(tmp_path / "c.yaml", tiny_model, pairs, **lora),
        launch=launcher(*TWO_PROCESSES[kind]),
        DS_ACCELERATOR="cpu",
    )
    assert difference(tmp_path / "out", adapter_run) < 1e-3
    assert difference(tmp_path / "out", tiny_model) > 1e-1


@pytest.mark.slow
def test_small_steps_on_bfloat16_weights_are_not_rounded_away(tiny_model, pairs, tmp_path):
    """A norm weight of 1.0 in bfloat16 cannot take a step of 1e-4; sixty of them add up in the float32 copy."""
    from transformers import AutoModelForCausalLM

    start = shutil.copytree(tiny_model, tmp_path / "start")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(start)
    settings = {"learning_rate": 1e-4, "max_steps": 60, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train(write_config(tmp_path / "c.yaml", start, pairs, bf16=True, **settings))
    pure = write_config(tmp_path / "p.yaml", start, pairs, output_dir=str(tmp_path / "pure"), **settings)
    assert "warning: the trained weights have 16 bits" in run_script("spin/run_spin.py", pure).stderr
    name = "model.norm.weight"
    assert weights(tmp_path / "out")[name].dtype == torch.float32  # saved as it was trained
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert weights(tmp_path / "pure")[name].dtype == torch.bfloat16
    assert weights(tmp_path / "out")[name].ne(1).any()
    assert weights(tmp_path / "pure")[name].eq(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP2"])
def test_sharded_float32_copies_start_from_and_are_saved_as_float32(tiny_model, pairs, tmp_path, kind):
    """A step of 1e-12 changes nothing: the saved weights are those of the start, which bfloat16 cannot represent."""
    settings = {
        "bf16": True,
        "dtype": "bfloat16",
        "learning_rate": 1e-12,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    }
    options = [item.replace("=no", "=bf16") for item in TWO_PROCESSES[kind]]
    if kind == "ZeRO-3":
        options += ["--mixed_precision", "bf16"]
    train(
        write_config(tmp_path / "c.yaml", tiny_model, pairs, **settings),
        launch=launcher(*options),
        DS_ACCELERATOR="cpu",
    )
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.float32}
    assert difference(tmp_path / "out", tiny_model) < 1e-9


@pytest.mark.slow
def test_adapters_are_merged_and_the_next_iteration_starts_at_ln_2(tiny_model, pairs, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "num_train_epochs": 3}
    train(write_config(tmp_path / "c0.yaml", tiny_model, pairs, output_dir=str(tmp_path / "iter0"), **lora))
    assert difference(tmp_path / "iter0", tiny_model) > 1e-3
    assert not (tmp_path / "iter0" / "adapter_config.json").exists()
    train(write_config(tmp_path / "c1.yaml", tmp_path / "iter0", pairs, output_dir=str(tmp_path / "iter1"), **lora))
    for folder in ("iter0", "iter1"):
        record = metrics(tmp_path / folder)
        assert record["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert late_margin(record) > 0


@pytest.mark.slow
def test_a_quantised_base_is_trained_and_saved_whole(tiny_model, pairs, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: pip install -e '.[qlora]'")
    settings = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "num_train_epochs": 3}
    train(write_config(tmp_path / "c.yaml", tiny_model, pairs, load_in_4bit=True, **settings))
    record = metrics(tmp_path / "out")
    assert record["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert late_margin(record) > 0
    assert weights(tmp_path / "out").keys() == weights(tiny_model).keys()  # no trace of 4-bit storage or adapters
    assert difference(tmp_path / "out", tiny_model) > 1e-3


@pytest.mark.slow
def test_the_merged_checkpoint_says_what_the_adapted_model_said(tiny_model, tmp_path):
    from spin.alignment.models.adapters import add_adapters, merge_adapters
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model
    from spin.alignment.models.saving import save_checkpoint
    from tests.helpers import char_tokenizer

    config = ModelConfig(model_name_or_path=str(tiny_model), use_peft=True, lora_r=4)
    model = add_adapters(load_model(config), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    ids = torch.arange(5, 25)[None]
    adapted = model(ids).logits
    save_checkpoint(merge_adapters(model, model.state_dict(), config), char_tokenizer(), tmp_path / "merged")
    merged = load_model(ModelConfig(model_name_or_path=str(tmp_path / "merged")))
    assert torch.allclose(merged(ids).logits, adapted, atol=1e-4)
    assert not torch.allclose(load_model(config)(ids).logits, adapted, atol=1e-2)
