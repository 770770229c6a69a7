"""What is saved is what was trained: the precision of checkpoints, and what rounding them would lose."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin import run_spin
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.settings import Settings
from spin.alignment.training.trained_policy import rounding_loss
from tests.helpers import run_main
from tests.helpers.training import difference, metrics, weights, write_config

SMALL_STEPS = {
    "bf16": True,
    "dtype": "bfloat16",
    "learning_rate": 2e-6,
    "max_steps": 6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """The tiny model with bfloat16 weights."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("bf16") / "start")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def train(config) -> str:
    code, out, err = run_main(run_spin.main, config)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def trained(start, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(write_config(folder / "c.yaml", start, pairs, **SMALL_STEPS))
    return folder / "out"


def test_weights_with_float32_masters_are_saved_in_float32(trained, start):
    assert {weight.dtype for weight in weights(trained).values()} == {torch.float32}
    assert metrics(trained)["save_dtype"] == "float32" and "rounding_loss" not in metrics(trained)
    config = json.loads((trained / "config.json").read_text())
    assert (config["dtype"], config["trained_in_dtype"]) == ("float32", "bfloat16")
    moved, rounded = 0, 0
    for name, weight in weights(trained).items():
        before = weights(start)[name]
        moved += int((weight != before.float()).sum())
        rounded += int((weight.bfloat16() != before).sum())
    assert rounded < 0.3 * moved  # what a bfloat16 checkpoint would have kept of it


def test_the_next_iteration_starts_from_the_float32_weights_even_with_dtype_bfloat16(trained, pairs, tmp_path):
    train(write_config(tmp_path / "c.yaml", trained, pairs, **SMALL_STEPS | {"learning_rate": 1e-12, "max_steps": 1}))
    assert difference(tmp_path / "out", trained) < 1e-9  # bfloat16 would differ by 1e-4


def test_a_16_bit_export_says_what_it_loses(start, trained, pairs, tmp_path):
    said = train(write_config(tmp_path / "c.yaml", start, pairs, save_dtype="bfloat16", **SMALL_STEPS))
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.bfloat16}
    error = moved = 0.0
    changed = back = 0
    for name, weight in weights(trained).items():  # the same training, saved in float32
        before = weights(start)[name].float()
        assert torch.equal(weights(tmp_path / "out")[name], weight.bfloat16())
        error += (weight.bfloat16().double() - weight.double()).square().sum().item()
        moved += (weight.double() - before.double()).square().sum().item()
        changed += int((weight != before).sum())
        back += int(((weight != before) & (weight.bfloat16() == before)).sum())
    found = metrics(tmp_path / "out")["rounding_loss"]
    assert found["update"] == pytest.approx((error / moved) ** 0.5) and found["update"] > 0.5
    assert found["unchanged"] == pytest.approx(back / changed) and found["unchanged"] > 0.5
    assert f"saving in bfloat16 loses {found['update']:.1%} of the update" in said


def test_merged_adapters_keep_their_update_on_a_bfloat16_base(start, pairs, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, **SMALL_STEPS}
    train(write_config(tmp_path / "c.yaml", start, pairs, **lora))
    merged = weights(tmp_path / "out")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    update = merged[name] - weights(start)[name].float()
    assert 0 < update.abs().max() < 1e-4  # below the spacing of bfloat16 at most of these weights
    assert torch.linalg.matrix_rank(update.double(), rtol=1e-2) <= 4


def test_nothing_is_lost_of_an_update_that_16_bits_can_hold(tiny_model):
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    state = {name: weight.bfloat16().float() for name, weight in start.state_dict().items()}
    arguments = type("Arguments", (), {"deepspeed_plugin": None, "seed": 1})()
    settings = Settings({}, ModelConfig(str(tiny_model)), None, arguments, None)
    found = rounding_loss(state, settings, torch.bfloat16)
    assert found.update == 0.0
