"""``spin export``: a model in 16 bits as a folder that transformers, vLLM and llama.cpp's converter read."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Literal

from spin.alignment.core.cards import CARD_FILE
from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import fsync_folder
from spin.alignment.core.paths import check_output_folder
from spin.alignment.core.provenance import hash_weights
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import model_folder
from spin.alignment.models.library_output import name_accelerator, quiet_library
from spin.alignment.models.loading import load_model
from spin.alignment.models.saved_model import check_saved
from spin.alignment.models.saving import save_checkpoint

ExportDtype = Literal["bfloat16", "float16", "float32"]


def export_model(model: str, out: Path, dtype: ExportDtype) -> None:
    """Write a model to the folder ``out`` in ``dtype``: weights (tied ones once), config, generation config, tokenizer, chat
    template, its card and ``SHA256SUMS``. The folder is complete or absent, and gives the same ids and logits when loaded again.

    Args:
        model: a model folder, or a Hub name.

    Raises:
        InputError: the model cannot be loaded, ``out`` is not new or empty, or the disk is full.
        NotFiniteError: a weight is not finite in ``dtype``.
    """
    import torch
    from transformers import AutoTokenizer

    check_output_folder(out, "OUT")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"OUT {out} is not empty: choose a new folder, or remove it")
    source = model_folder(model)
    hash_weights(source)  # refuses files that are not those that were saved
    name_accelerator()
    policy = load_model(ModelConfig(model_name_or_path=model, dtype=dtype))
    staging = out.absolute().with_name(f".{out.name}.exporting-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with quiet_library():
            tokenizer = AutoTokenizer.from_pretrained(source)
            save_checkpoint(policy, tokenizer, staging, dtype=getattr(torch, dtype))
            check_saved(policy, tokenizer, staging)
        if (source / CARD_FILE).is_file():
            shutil.copyfile(source / CARD_FILE, staging / CARD_FILE)
        staging.replace(out)  # onto nothing or an empty folder
        fsync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    say(f"wrote {out}: {dtype}, {size / 2**20:.1f} MiB of weights")
