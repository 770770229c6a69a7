"""Token log-probabilities at response positions: the head never runs over the prompt."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT32_ELEMENTS = 2**24


def response_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return ``log pi(y_t | x, y_<t)`` in nats, float32, of shape ``(2B, R)``; 0 behind the end of a response.

    ``logits_to_keep`` keeps the head inside the model's own forward, so parameters that ZeRO-3 or FSDP hold in pieces are
    gathered as usual and no model code is patched.
    """
    mask = batch["completion_mask"]
    width = mask.shape[1]
    known = inspect.signature(_inner_forward(model)).parameters
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in known}
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = width + 1
    logits = model(**inputs, use_cache=False).logits[:, -width - 1 : -1]
    return token_logps(logits, batch["input_ids"][:, -width:], mask)


def token_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probs of ``labels`` ``(N, R)`` under ``logits`` ``(N, R, V)``, in float32; 0 where the mask is 0.

    A few rows are turned to float32 at a time, and again in the backward pass: the log-softmax of the full block would be
    the largest tensor of the step.
    """
    rows = max(1, _FLOAT32_ELEMENTS // max(1, logits[0].numel()))
    pieces = list(zip(logits.split(rows), labels.split(rows), strict=True))
    if logits.requires_grad and len(pieces) > 1:
        settings = {"use_reentrant": False, "preserve_rng_state": False}
        found = [checkpoint(_piece_logps, some, targets, **settings) for some, targets in pieces]
    else:
        found = [_piece_logps(some, targets) for some, targets in pieces]
    return torch.cat(found).view(labels.shape).masked_fill(mask == 0, 0.0)


def _piece_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")


def _inner_forward(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.forward
