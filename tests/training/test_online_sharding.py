"""How a policy may be sharded in online training, checked before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.training.online.run import check_sharding

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage: int, **offload: str) -> SimpleNamespace:
    config = {"zero_optimization": {"stage": stage, "offload_param": offload}}
    return SimpleNamespace(zero_stage=stage, deepspeed_config=config)


def check(monkeypatch, environment, **arguments):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"backend": "transformers", "ref_update_freq": 3, "alpha": 0.0, "async_steps": 0} | arguments
    check_sharding(SimpleNamespace(**given))


@pytest.mark.parametrize(
    ("environment", "arguments", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "takes FSDP version 2, not 1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "set fsdp_offload_params: false"),
        ({}, {"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "set fsdp_offload_params: false"),
        (
            {},
            {"deepspeed_plugin": zero(3, device="nvme")},
            "ref_update_freq is 3, but weights that ZeRO-3 keeps on NVMe",
        ),
        (
            {},
            {"deepspeed_plugin": zero(3, device="nvme"), "ref_update_freq": 1, "backend": "vllm", "async_steps": 1},
            "async_steps is 1, but weights that ZeRO-3 keeps on NVMe .* set async_steps to 0",
        ),
    ],
)
def test_what_cannot_be_sampled_from_is_refused(monkeypatch, environment, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        check(monkeypatch, environment, **arguments)


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        (FSDP2, {}),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, {"backend": "vllm"}),
        ({}, {"deepspeed_plugin": zero(2)}),
        ({}, {"deepspeed_plugin": zero(3, device="cpu")}),
        ({}, {"deepspeed_plugin": zero(3, device="nvme"), "ref_update_freq": 1}),
    ],
)
def test_everything_else_is_taken(monkeypatch, environment, arguments):
    check(monkeypatch, environment, **arguments)
