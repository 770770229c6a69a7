"""What is asked of a tokenizer as a whole: many texts to ids, many ids to texts, each in one call, and its hash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from spin.alignment.core.provenance import hash_json

# What a class may replace of the library's way from text to ids, and back.
_ENCODING = ("__call__", "_encode_plus", "set_truncation_and_padding", "_switch_to_input_mode")
_DECODING = ("decode", "_decode")


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens around it. Control tokens in the text are encoded as such."""
    if not texts:
        return []
    # The first text alone also resets what an earlier call may have left behind: truncation, padding, split control tokens.
    first = tokenizer(texts[0], add_special_tokens=False, split_special_tokens=False)["input_ids"]
    if not _is_plain(tokenizer, _ENCODING):
        rest = (tokenizer(text, add_special_tokens=False, split_special_tokens=False) for text in texts[1:])
        return [first, *(encoding["input_ids"] for encoding in rest)]
    # Without the offsets of characters, which take a fifth of the time and are not needed.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts[1:]), add_special_tokens=False)
    return [first, *(encoding.ids for encoding in encodings)]


def decode_ids(tokenizer: Any, sequences: Sequence[list[int]]) -> list[str]:
    """Return the text of each sequence of ids, control tokens included and spaces as they are."""
    if _is_plain(tokenizer, _DECODING):
        found: list[str] = tokenizer.backend_tokenizer.decode_batch(list(sequences), skip_special_tokens=False)
        return found
    return [
        tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )
        for ids in sequences
    ]


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the content hash of everything that affects how text is converted to ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_json({"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens})
    state = json.loads(backend.to_str())
    # Padding and truncation reflect the last call, not the tokenizer itself.
    state.pop("padding", None)
    state.pop("truncation", None)
    return hash_json({"tokenizer": state, "eos": tokenizer.eos_token, "bos": tokenizer.bos_token})


def _is_plain(tokenizer: Any, names: Sequence[str]) -> bool:
    """Return whether a tokenizer does these things in the library's own way, which only passes them on to Rust."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) and name not in vars(tokenizer)
        for name in names
    )
