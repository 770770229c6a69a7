"""The check that a saved model is the one in memory: the same ids, chat template and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spin.alignment.models.config import ModelConfig
from spin.alignment.models.loading import load_model

_PROBE = "The capital of France is Paris.\n\n1. 2024 - 17 = 2007\n\n\tdef f(x):  return x ** 2  # naïve"


def check_saved(model: Any, tokenizer: Any, folder: Path) -> None:
    """Load a saved folder and compare it with the model (in the precision that it has in memory) and tokenizer that were saved.

    Raises:
        RuntimeError: they differ.
    """
    import torch
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_PROBE)["input_ids"]
    if again(_PROBE)["input_ids"] != ids or again.chat_template != tokenizer.chat_template:
        raise RuntimeError(f"the tokenizer saved in {folder} differs from the one that was read")
    dtype: Any = str(model.dtype).removeprefix("torch.")
    reloaded = load_model(ModelConfig(model_name_or_path=str(folder), dtype=dtype))
    row = torch.tensor([ids])
    with torch.inference_mode():
        if not torch.equal(model(row).logits, reloaded(row).logits):
            raise RuntimeError(f"the model saved in {folder} gives other logits than the one that was read")
