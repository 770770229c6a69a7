"""An engine that gets the weights of the policy like vLLM, but decodes in this process, with the responses of the policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from spin.alignment.generation import BACKENDS
from spin.alignment.generation.base import BackendSettings
from spin.alignment.generation.transformers.backend import TransformersBackend


def whole_model(folder: str) -> Any:
    """Load a model that ZeRO-3 does not partition."""
    configuration = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    deepspeed._hf_deepspeed_config_weak_ref = configuration
    return model


class EngineInProcess(TransformersBackend):
    def __init__(self, settings: BackendSettings) -> None:
        self.alone = settings.adapter_rank > 0
        super().__init__(settings, whole_model(settings.model))

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert not self.alone
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            own.pop(name).data.copy_(weight)
        assert not own

    def load_adapter(self, folder: str) -> None:
        from peft import PeftModel

        assert self.alone
        base = whole_model(self.settings.model)
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        self.model.load_state_dict(merged.state_dict())

    def sleep(self) -> None:
        """Do nothing: this engine has no memory to give back."""

    def cancel(self) -> None:
        """Do nothing: no batch is ever under way when this engine is closed."""


def use_engine_in_process() -> None:
    """Put it in the place of vLLM."""
    BACKENDS["vllm"] = replace(
        BACKENDS["vllm"],
        make=EngineInProcess,
        check_installed=lambda: None,
        adapter_obstacle=lambda config, rank: None,
    )
