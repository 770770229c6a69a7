"""Precision as a configuration asks for it, on the machine at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin.alignment.core.errors import InputError
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
