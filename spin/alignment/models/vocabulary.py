"""The ids of a tokenizer against the vocabulary of a model: neither may be larger without anybody noticing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from spin.alignment.core.errors import InputError


class Encoder(Protocol):
    """What is needed of a chat encoder (``data/chat_encoder.py``)."""

    tokenizer: Any
    name: str
    stop_ids: list[int]
    pad_id: int

    def prompt_ids(self, prompt: Any) -> list[int]: ...


def vocabulary_size(config: Any) -> int | None:
    """Return the number of ids that a model can read and write, from its configuration (an object, or config.json's content)."""
    if isinstance(config, Mapping):
        text = config.get("text_config")
        config = text if isinstance(text, Mapping) else config  # of a multimodal model, the language model's
        size = config.get("vocab_size")
    else:
        size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def check_control_tokens(encoder: Encoder, config: Any, model: str) -> None:
    """Check the ids that every sequence contains: control tokens, those of the chat template, and padding.

    Raises:
        InputError: the model has no embedding for one of them; the token is named.
    """
    size = vocabulary_size(config)
    if size is None:
        return
    probe = encoder.prompt_ids([{"role": "user", "content": "Hi"}])
    special = encoder.tokenizer.all_special_ids
    outside = sorted({token for token in (*probe, *encoder.stop_ids, encoder.pad_id, *special) if token >= size})
    if outside:
        names = ", ".join(f"{encoder.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in outside[:3])
        raise InputError(
            f"the tokenizer of {encoder.name} has {len(encoder.tokenizer)} tokens, but {model} has embeddings for {size}, "
            f"without {names}, which every sequence needs: call resize_token_embeddings and save the model, or "
            "give the tokenizer that it was trained with"
        )


def check_ids(ids: Iterable[int], config: Any, model: str, where: str) -> None:
    """Check token ids of data against a model's vocabulary; ``where`` says which data.

    Raises:
        InputError: the model has no embedding for one of them.
    """
    size, largest = vocabulary_size(config), max(ids, default=0)
    if size is not None and largest >= size:
        raise InputError(
            f"{where} contains token id {largest}, but the vocabulary of {model} has {size} entries: give the model whose "
            "tokenizer encoded the data, or resize its embeddings"
        )


def ids_without_token(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """Return the ids of a model that its tokenizer has no token for, ascending: padding of the vocabulary, and gaps.

    They decode to nothing, so they must not be sampled.
    """
    size = vocabulary_size(config)
    if size is None:
        return ()
    known = set(tokenizer.get_vocab().values())
    return tuple(number for number in range(size) if number not in known)
