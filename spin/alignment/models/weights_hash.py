"""A content hash of a model in memory; that of a folder is ``core/provenance.py``'s :func:`hash_weights`."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import TYPE_CHECKING

from spin.alignment.core.provenance import hash_text

if TYPE_CHECKING:
    import torch


def hash_module(model: torch.nn.Module) -> str:
    """Return one hash of the names, types and values of a module's parameters and buffers: about a second per 1.5 GB.

    Of weights that DeepSpeed ZeRO-3 has partitioned, the part of this process counts.
    """
    import torch

    parts = []
    for name, tensor in sorted(chain(model.named_parameters(), model.named_buffers())):
        held = getattr(tensor, "ds_tensor", tensor).detach().cpu().reshape(-1)
        content = hashlib.sha256(held.view(torch.uint8).numpy().data).hexdigest()
        parts.append(f"{name} {tensor.dtype} {tuple(held.shape)} {content}")
    return hash_text(*parts)
