"""Makes the embedded demo's data, tokenizer and model configuration in ``data/iter0``; the same bytes at every run.

    python scripts/make_demo_data.py [OUTPUT_DIR]

The task is two-digit multiplication with the steps written out: ``34*27`` -> ``680+238=918``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.rows import PROMPT_SCHEMA

NUM_TEST = 500
SEED = 0
CHARACTERS = "0123456789+*= "
SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}{{ raise_exception('this template knows only user and assistant turns') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def problems() -> Iterator[dict[str, object]]:
    """Yield every product of two two-digit numbers as a prompt row, shuffled."""
    pairs = [(left, right) for left in range(10, 100) for right in range(10, 100)]
    random.Random(SEED).shuffle(pairs)
    for left, right in pairs:
        tens, ones = left * (right // 10 * 10), left * (right % 10)
        yield {
            "prompt_id": f"{left}x{right}",
            "chosen": [
                {"role": "user", "content": f"{left}*{right}"},
                {"role": "assistant", "content": f"{tens}+{ones}={tens + ones}"},
            ],
        }


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a character, with a chat template of four special tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=64,
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_llama(vocab_size: int, hidden: int = 96, feed_forward: int = 192) -> LlamaConfig:
    """Return a Llama of two layers and a context of 64 tokens: 0.19 million parameters by default."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )


def main(output_dir: Path) -> None:
    rows = list(problems())
    for split, part in (("test", rows[:NUM_TEST]), ("train", rows[NUM_TEST:])):
        provenance = Provenance("prompts", split=split, sampling={"task": "two-digit multiplication", "seed": SEED})
        with ParquetSink(output_dir / f"{split}.parquet", PROMPT_SCHEMA, provenance) as sink:
            sink.write(part)
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save_pretrained(output_dir / "model")
    tiny_llama(len(tokenizer)).save_pretrained(output_dir / "model")
    print(
        f"wrote {len(rows) - NUM_TEST} training and {NUM_TEST} test prompts and the model configuration to {output_dir}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "data" / "iter0")
