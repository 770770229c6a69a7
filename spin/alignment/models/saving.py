"""Saving a checkpoint atomically: it is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import NotFiniteError
from spin.alignment.core.files import share_files
from spin.alignment.core.provenance import SUMS_FILE, write_sums
from spin.alignment.models.precision import TRAINED_IN

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    output_dir: str | Path,
    state_dict: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    trained_in: str | None = None,
) -> Path:
    """Save everything needed to load a model: weights, config, generation config, tokenizer and chat template; and their
    ``SHA256SUMS``, which :func:`hash_weights` compares.

    Everything is written to a hidden folder, fsynced and moved into place, ``config.json`` last: its existence proves
    completion. Other files in ``output_dir`` (trainer checkpoints, metrics) are kept. ``dtype`` is the precision of the saved
    weights (default: that of each weight in ``state_dict``); ``trained_in`` is the precision that the model computed in while
    its weights were trained in a higher one (see :func:`spin.alignment.models.precision.generation_dtype`).

    Raises:
        NotFiniteError: a weight is not finite, or not in ``dtype``; nothing is written.
        OSError: the disk is full; what was in ``output_dir`` is unchanged.
    """
    state_dict = finite_state(model.state_dict() if state_dict is None else state_dict, dtype)
    for copy in getattr(model, "all_tied_weights_keys", None) or {}:
        state_dict.pop(copy, None)  # a state gathered from shards contains tied weights twice
    saved_in = most_common_dtype(state_dict)  # before save_pretrained, which empties the state as it writes
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hidden = output_dir / f".saving-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    for stale in output_dir.glob(".saving-*"):  # left by a killed run
        shutil.rmtree(stale)
    try:
        model.save_pretrained(hidden, state_dict=state_dict)
        _write_dtype(hidden / "config.json", saved_in, trained_in)
        tokenizer.save_pretrained(hidden)
        write_sums(hidden)
        share_files(hidden)
        for path in hidden.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)  # it would fill the disk until the next attempt
        raise
    # config.json goes first and comes back last: a crash in between leaves a folder that no reader takes for a model.
    for stale in [output_dir / "config.json", output_dir / SUMS_FILE, *output_dir.glob("*.safetensors*")]:
        stale.unlink(missing_ok=True)
    for path in sorted(hidden.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        target = output_dir / path.name
        if target.is_dir():  # the named templates of a tokenizer that has several
            shutil.rmtree(target)
        path.replace(target)
    hidden.rmdir()
    return output_dir


def finite_state(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return a copy of a state with its floating-point weights in ``dtype`` (None: unchanged).

    Raises:
        NotFiniteError: a weight is not finite, or too large for ``dtype``; it is named.
    """
    converted = {}
    for name, weight in state_dict.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise NotFiniteError(f"the trained weight {name} is not finite: lower the learning rate and train again")
        found = weight if dtype is None or not weight.is_floating_point() else weight.to(dtype)
        if found is not weight and not found.isfinite().all():
            raise NotFiniteError(f"the trained weight {name} is too large for save_dtype {dtype}: set it to bfloat16")
        converted[name] = found
    return converted


def most_common_dtype(state_dict: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """Return the precision of most of the numbers in a state; None if it has no floating-point weights."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in state_dict.values():
        if weight.is_floating_point():
            sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _write_dtype(config_file: Path, dtype: torch.dtype | None, trained_in: str | None) -> None:
    """Record the precision of the saved weights; ``save_pretrained`` wrote that of the model in memory."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop(TRAINED_IN, None)  # that of the model that training started from
    if trained_in and trained_in != config.get("dtype"):
        config[TRAINED_IN] = trained_in
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
