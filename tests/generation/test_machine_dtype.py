"""bfloat16 for a large float32 checkpoint on a CPU that is faster in it: when it is chosen, and that it is recorded."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from spin.alignment.core.provenance import read_provenance
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend
from spin.alignment.models import precision
from spin.alignment.models.precision import decoding_dtype, machine_dtype
from spin.evaluate_model import main as evaluate
from spin.generate import main as generate
from tests.helpers import run_main, save_tiny_model


@pytest.fixture
def fast_machine(monkeypatch):
    """A machine that is fast in bfloat16, for which the tiny models here are large."""
    monkeypatch.setattr(precision, "_LARGE_BYTES", 0)
    monkeypatch.setattr(precision, "has_bfloat16_instructions", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("precision") / "model")


def test_only_a_large_float32_checkpoint_is_rounded(model, fast_machine, monkeypatch, tmp_path, capsys):
    assert machine_dtype(model, "auto") == "bfloat16"
    assert machine_dtype(model, "float32") is None and decoding_dtype(str(model), None, "float32") == "float32"
    assert capsys.readouterr().err == ""
    assert decoding_dtype(str(model), None, "auto") == "bfloat16"
    assert "responses are generated in bfloat16 (dtype: float32 keeps" in capsys.readouterr().err
    half = save_tiny_model(tmp_path / "half", dtype="bfloat16")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert machine_dtype(half, "auto") is None
    (half / "config.json").write_text(json.dumps(config | {"dtype": "float32", precision.TRAINED_IN: "bfloat16"}))
    assert machine_dtype(half, "auto") is None  # generation_dtype decides
    monkeypatch.setattr(precision, "_LARGE_BYTES", 200 * 10**6)
    assert machine_dtype(model, "auto") is None
    monkeypatch.setattr(precision, "_LARGE_BYTES", 0)
    monkeypatch.setattr(precision, "has_bfloat16_instructions", lambda: False)
    assert machine_dtype(model, "auto") is None


def test_the_backend_loads_in_it(model, fast_machine):
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        assert TransformersBackend(BackendSettings(str(model), dtype=dtype)).model.dtype == expected


def test_fractions_of_machines_that_choose_differently_are_not_mixed(model, fast_machine, monkeypatch, tmp_path):
    rows = [{"prompt_id": f"q{number}", "prompt": f"What is {number}?", "response": "1"} for number in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        paths = ("--model", model, "--input_dir", tmp_path / "train.jsonl", "--output_dir", tmp_path / name)
        return run_main(generate, *paths, "--max_new_tokens", 4, *flags)

    def recorded(name: str) -> object:
        path = tmp_path / name / "train-00000.parquet"
        return read_provenance(pq.read_schema(path), path).sampling.get("computed_in")

    code, _, err = run("auto")
    assert code == 0 and "responses are generated in bfloat16" in err
    assert recorded("auto") == "bfloat16"
    assert run("explicit", "--dtype", "float32")[0] == 0 and recorded("explicit") is None
    monkeypatch.setattr(precision, "has_bfloat16_instructions", lambda: False)
    code, _, err = run("auto")
    assert code == 2 and "sampling.computed_in: None != 'bfloat16'" in err
    assert run("explicit", "--dtype", "float32")[0] == 0


def test_log_likelihoods_of_an_evaluation_are_those_of_the_stored_weights(model, fast_machine, tmp_path):
    rows = [{"prompt_id": f"q{number}", "prompt": f"What is {number}?", "response": "1"} for number in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        paths = ("--model", model, "--input_dir", tmp_path / "test.jsonl", "--output_file", tmp_path / f"{dtype}.json")
        code, _, err = run_main(*(evaluate, *paths, "--dtype", dtype, "--max_new_tokens", 4, "--temperatures", 0))
        assert code == 0 and ("generated in bfloat16" in err) == (dtype == "auto"), err
        found[dtype] = json.loads((tmp_path / f"{dtype}.json").read_text())["nll"]
    assert found["auto"] == found["float32"] != found["bfloat16"]
    path = tmp_path / "auto.parquet"
    assert read_provenance(pq.read_schema(path), path).extra["computed_in"] == "bfloat16"
