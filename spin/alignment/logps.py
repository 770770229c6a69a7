"""Token log-probabilities at response positions: the head never runs over the prompt."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def response_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return ``log pi(y_t | x, y_<t)`` in nats, float32, of shape ``(2B, R)``; 0 behind the end of a response.

    ``logits_to_keep`` keeps the head inside the model's own forward, so parameters that ZeRO-3 or FSDP hold in pieces are
    gathered as usual and no model code is patched.
    """
    mask = batch["completion_mask"]
    width = mask.shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    if "logits_to_keep" in inspect.signature(_inner_forward(model)).parameters:
        inputs["logits_to_keep"] = width + 1
    logits = model(**inputs, use_cache=False).logits[:, -width - 1 : -1]
    return token_logps(logits, batch["input_ids"][:, -width:], mask)


def token_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probs of ``labels`` ``(N, R)`` under ``logits`` ``(N, R, V)``, in float32; 0 where the mask is 0.

    One row is turned to float32 at a time: the full block in float32 would be the largest tensor of the step.
    """
    rows = [
        -torch.nn.functional.cross_entropy(row.float(), target, reduction="none")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows).masked_fill(mask == 0, 0.0)


def _inner_forward(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.forward
