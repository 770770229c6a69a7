"""What launchers say in environment variables: checked before data or a model is loaded, never a traceback of a library."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.launcher import check_launch_numbers
from spin.alignment.training.launch_check import check_launch, check_launched_precision

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NAMES = (*TWO, "LOCAL_WORLD_SIZE", *(f"ACCELERATE_{name}" for name in ("MIXED_PRECISION", "USE_CPU", "USE_DEEPSPEED")))


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def check(monkeypatch, variables, **settings):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_launch_numbers()
    check_launch()
    check_launched_precision(SimpleNamespace(fp16=False, bf16=False) if not settings else SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0'"),
        ({**TWO, "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU is 'maybe'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no launcher has started this process"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism config is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "nonsense"}, "ACCELERATE_DYNAMO_BACKEND is 'nonsense'"),
        ({"ACCELERATE_TORCH_DEVICE": "nonsense"}, "ACCELERATE_TORCH_DEVICE is 'nonsense'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION is 'fp8'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "set fp16 to true"),
    ],
)
def test_a_launch_that_cannot_work_is_named(monkeypatch, variables, says):
    with pytest.raises(InputError, match=says):
        check(monkeypatch, variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TWO,
        {"WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "False"},
        {"ACCELERATE_TORCH_DEVICE": "cpu", **TWO, "ACCELERATE_USE_DEEPSPEED": "true"},
    ],
)
def test_what_launchers_set_is_accepted(monkeypatch, variables):
    check(monkeypatch, variables)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    check_launched_precision(SimpleNamespace(fp16=True, bf16=False))


def test_a_program_ends_with_the_sentence(monkeypatch):
    from spin import convert_data
    from tests.helpers import run_main

    monkeypatch.setenv("WORLD_SIZE", "two")
    code, _, err = run_main(convert_data.main, "--input_dir", "x", "--output_dir", "y")
    assert code == 2 and "WORLD_SIZE is 'two'" in err and err.count("\n") == 1
