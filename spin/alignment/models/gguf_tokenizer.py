"""The tokenizer of a GGUF file, with the splitting of text that the file names."""

from __future__ import annotations

from typing import Any

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.models.gguf_file import ORIGINAL, GgufFile

# Names of ``tokenizer.ggml.pre`` (llama.cpp's, src/llama-vocab.cpp) for byte-level vocabularies, by how text is split before
# merging: as GPT-2 does, which is also what transformers does for every name it does not know; or with each digit alone first.
_LIKE_GPT2 = {"", "default", "gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}


def read_tokenizer(gguf: GgufFile, context: int) -> Any:
    """Return the tokenizer in a GGUF file; ``context`` (tokens) becomes its ``model_max_length``.

    Raises:
        InputError: transformers cannot build it, or would split text in another way than the model was trained with.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"the tokenizer of {gguf.path} cannot be read ({reason_of(error)}): {ORIGINAL}") from error
    if gguf.metadata.get("tokenizer.ggml.model") == "gpt2":
        _split_as_trained(tokenizer, gguf)
    tokenizer.model_max_length = context
    return tokenizer


def _split_as_trained(tokenizer: Any, gguf: GgufFile) -> None:
    """Give a byte-level tokenizer the split that its file names, where transformers has used that of GPT-2 instead.

    With the wrong split most text keeps its ids, but "\\n\\n1." does not: the model would read ids it has never seen in a row.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = str(gguf.metadata.get("tokenizer.ggml.pre", ""))
    if name in GGUF_PRE_TOKENIZER_SPLITS or name in _LIKE_GPT2:
        return
    if name not in _DIGITS_ALONE:
        raise InputError(f"the tokenizer of {gguf.path} splits text as '{name}', which is not supported: {ORIGINAL}")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
