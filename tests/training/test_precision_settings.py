"""Precision as a configuration asks for it, on the machine at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.models.library_output import name_accelerator
from spin.alignment.models.precision import decoding_dtype
from spin.alignment.training.run import precision_remarks
from spin.alignment.training.settings import Settings, read_settings
from spin.alignment.training.trainer import SPINConfig

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="these settings are for machines with only a CPU"
)


def settings(tiny_model, tmp_path, **values: Any) -> Settings:
    base = {"model_name_or_path": str(tiny_model), "dataset_mixer": {"pairs": 1.0}, "output_dir": str(tmp_path)}
    return read_settings(base | values, "a.yaml", SPINConfig)


def test_bfloat16_on_a_cpu_needs_no_second_key_and_is_recorded_as_it_was_given(tiny_model, tmp_path):
    found = settings(tiny_model, tmp_path, bf16=True)
    assert found.arguments.bf16 and found.arguments.device.type == "cpu"
    assert "use_cpu" not in found.values
    assert not settings(tiny_model, tmp_path).arguments.use_cpu


def test_a_key_that_forbids_the_cpu_is_still_refused(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"bf16: True of a\.yaml cannot be used here .* use_cpu "):
        settings(tiny_model, tmp_path, bf16=True, use_cpu=False)


@pytest.fixture
def large(tmp_path) -> Path:
    """A model folder with float32 weights of 240 million bytes, as far as anybody sees who does not read them."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(240 * 10**6)
    return tmp_path


def cpu_with(monkeypatch, **instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)


def test_a_large_float32_model_generates_in_bfloat16_on_a_cpu_that_is_faster_in_it(
    large, tiny_model, monkeypatch, capsys
):
    sentence = f"{large} is stored in float32 and this CPU is faster in bfloat16: responses are generated in bfloat16"
    cpu_with(monkeypatch, avx512_bf16=True)
    assert decoding_dtype(str(large), None, "auto") == "bfloat16" and sentence in capsys.readouterr().err
    # Chosen by the user, too small to matter, or on a CPU that would emulate it.
    assert decoding_dtype(str(large), None, "float32") == "float32"
    assert decoding_dtype(str(tiny_model), None, "auto") == "auto"
    cpu_with(monkeypatch, avx512_f=True, avx512_bf16=False)
    assert decoding_dtype(str(large), None, "auto") == "auto"
    assert capsys.readouterr().err == ""


def test_training_in_float32_is_said_where_this_cpu_is_faster_in_bfloat16(large, tiny_model, tmp_path, monkeypatch):
    cpu_with(monkeypatch, amx_bf16=True)
    plain = settings(tiny_model, tmp_path)
    (remark,) = precision_remarks(plain, large)
    assert remark.startswith("training computes in float32;") and remark.endswith("(bf16: true)")
    assert precision_remarks(plain, tiny_model) == []
    assert precision_remarks(settings(tiny_model, tmp_path, bf16=True), large) == []
    cpu_with(monkeypatch)
    assert precision_remarks(plain, large) == []


def test_deepspeed_is_told_that_there_is_only_a_cpu_unless_the_user_has_chosen(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    name_accelerator()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "hpu")
    name_accelerator()
    assert os.environ["DS_ACCELERATOR"] == "hpu"
