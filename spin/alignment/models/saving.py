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

from spin.alignment.core.files import share_files

if TYPE_CHECKING:
    import torch


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    output_dir: str | Path,
    state_dict: dict[str, Any] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Path:
    """Save everything needed to load a model: weights, config, generation config, tokenizer and chat template.

    Everything is written to a hidden folder, fsynced and moved into place, ``config.json`` last: its existence proves
    completion. Other files in ``output_dir`` (trainer checkpoints, metrics) are kept. ``dtypes`` gives the precision of
    each weight where it differs from the model in memory.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    for copy in getattr(model, "all_tied_weights_keys", None) or {}:
        state_dict.pop(copy, None)  # a state gathered from shards contains tied weights twice
    for name, weight in state_dict.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise FloatingPointError(
                f"the trained weight {name} is not finite: lower the learning rate and train again"
            )
        if dtypes and name in dtypes:
            state_dict[name] = weight.to(dtypes[name])
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hidden = output_dir / f".saving-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    for stale in output_dir.glob(".saving-*"):  # left by a killed run
        shutil.rmtree(stale)
    model.save_pretrained(hidden, state_dict=state_dict)
    if dtypes:
        _write_dtype(hidden / "config.json", Counter(dtypes.values()).most_common(1)[0][0])
    tokenizer.save_pretrained(hidden)
    share_files(hidden)
    files = sorted((path for path in hidden.iterdir()), key=lambda path: path.name == "config.json")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    # config.json goes first and comes back last: a crash in between leaves a folder that no reader takes for a model.
    for stale in [output_dir / "config.json", *output_dir.glob("*.safetensors*")]:
        stale.unlink(missing_ok=True)
    for path in files:
        path.replace(output_dir / path.name)
    hidden.rmdir()
    return output_dir


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Record the precision of the saved weights; ``save_pretrained`` wrote that of the model in memory."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
