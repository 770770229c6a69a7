"""Whole weights for an engine: those a model folder would have, adapters merged; and what shards a training's weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin.alignment.models.adapters import add_adapters
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.sharded import has_stored_names, is_sharded, local_part, sharding_name, whole_weights
from spin.alignment.models.weights_check import stored_weights


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_the_weights_are_those_of_the_folder(model, tiny_model):
    assert has_stored_names(model) and not is_sharded(model)
    found = dict(whole_weights(model))
    stored = stored_weights(tiny_model)
    assert {name: weight.shape for name, weight in found.items()} == {name: t.shape for name, t in stored.items()}
    local_part(model.lm_head.weight).fill_(3.0)
    assert model.lm_head.weight.eq(3.0).all()


def test_under_zero_3_the_list_of_conversions_says_nothing_of_those_applied(model):
    model._weight_conversions = [object()]
    assert not has_stored_names(model)
    model.lm_head.weight.ds_id = 0
    assert has_stored_names(model)


def test_adapters_are_merged_weight_by_weight(model, tiny_model):
    adapted = add_adapters(model, ModelConfig(str(tiny_model), use_peft=True, lora_r=4, lora_alpha=7))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_()
    found = {name: weight.clone() for name, weight in whole_weights(adapted)}
    expected = dict(adapted.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


def test_a_mixture_of_experts_has_other_weights_in_memory():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert not has_stored_names(
        MixtralForCausalLM(MixtralConfig(vocab_size=8, num_key_value_heads=1, num_local_experts=2, **shape))
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "name"),
    [
        ({}, {}, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, {}, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, {}, "DeepSpeed ZeRO-3"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": {}}, {}, "FSDP2"),
    ],
)
def test_what_shards_the_weights_is_known_before_a_model_is_loaded(monkeypatch, arguments, environment, name):
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert sharding_name(SimpleNamespace(**arguments)) == name
