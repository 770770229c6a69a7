"""Weights on their way to a running engine, one at a time: how one is sent, and the part of vLLM's worker that takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def packed_weight(weight: Tensor) -> tuple[str, list[int], bytes]:
    """Return a weight as its type, shape and content, which cross to another process as they are."""
    import torch

    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(weight.dtype).removeprefix("torch."), list(weight.shape), content


class WeightReceiver:
    """Methods that vLLM adds to its worker (``worker_extension_cls``), called in every worker of an engine.

    vLLM transforms a layer for its kernels once all of its weights have arrived, and copies it to where the old one was.
    """

    vllm_config: Any
    model_runner: Any

    def begin_policy_weights(self) -> None:
        """Prepare the model for new weights."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def take_policy_weight(self, name: str, dtype: str, shape: list[int], content: bytes) -> None:
        """Load one weight, named as in a model folder.

        Raises:
            RuntimeError: the engine's model has no such weight.
        """
        import torch
        from vllm.config import set_current_vllm_config

        # A copy, because vLLM keeps it until its layer is complete.
        weight = torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(shape)
        with set_current_vllm_config(self.vllm_config):
            loaded = self.model_runner.get_model().load_weights([(name, weight)])
        if loaded is not None and not loaded:
            raise RuntimeError(f"the model of vLLM takes no weight {name}")

    def end_policy_weights(self) -> None:
        """Put the new weights to use."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
