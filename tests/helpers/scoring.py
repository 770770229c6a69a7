"""Tiny random scoring models, made in code, and groups to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spin.alignment.rewards import PromptGroup
from tests.helpers import char_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def save_decoder(folder: Path, seed: int = 0, labels: int = 1, **settings: Any) -> Path:
    """Save a tiny random Llama classifier with a chat template and a pad id of its own."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = char_tokenizer()
    settings = {"pad_token_id": tokenizer.pad_token_id, "num_key_value_heads": 2} | SHAPE | settings
    return _save(folder, LlamaForSequenceClassification, LlamaConfig, tokenizer, seed, labels, settings)


def save_encoder(folder: Path, seed: int = 0, labels: int = 1, **settings: Any) -> Path:
    """Save a tiny random BERT classifier without a chat template, with class and separator tokens and token types."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification

    special = ("[CLS]", "[SEP]")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = char_tokenizer(special, None, cls_token="[CLS]", sep_token="[SEP]", model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in special],
    )
    settings = {"pad_token_id": tokenizer.pad_token_id} | SHAPE | settings
    return _save(folder, BertForSequenceClassification, BertConfig, tokenizer, seed, labels, settings)


def _save(folder: Path, kind: Any, config: Any, tokenizer: Any, seed: int, labels: int, settings: Any) -> Path:
    import torch

    torch.manual_seed(seed)
    model = kind(config(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.1, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_group(prompt_id: str = "p1", responses: tuple[str, ...] = ("7", "a word", "four of them"), **changes: Any):
    prompt = changes.pop("prompt", [{"role": "user", "content": f"say {prompt_id}"}])
    return PromptGroup(prompt_id, prompt, list(responses), **changes)


def count_forwards(scorer: Any, monkeypatch: Any) -> list[int]:
    """Return a list that will hold the number of inputs of each forward pass of a scorer's model."""
    seen: list[int] = []
    forward = scorer.classifier._forward
    monkeypatch.setattr(
        scorer.classifier, "_forward", lambda batch, model: seen.append(len(batch)) or forward(batch, model)
    )
    return seen
