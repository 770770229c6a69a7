"""A tokenizer trained on the texts of a data set, and the configuration of a small Llama: a start for runs from scratch.

    python -m spin.alignment.pipeline.demos.small_model --input_dir data/gsm8k --output_dir data/gsm8k_model

The tokenizer is byte-level BPE with the ChatML template; weights come with ``init_from_config: true`` in the section sft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import Parser, run_program
from spin.alignment.data.rows import stream_prompts

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_parser() -> Parser:
    parser = Parser(prog="small_model", description="Train a tokenizer and write the configuration of a small model.")
    add = parser.add_argument
    add("--input_dir", required=True, help="prompts with ground truth: folder, file or Hub name")
    add("--split", default="train", help="split of the data")
    add("--output_dir", required=True, help="folder for tokenizer and config.json")
    add("--vocab", type=int, default=4096, help="size of the vocabulary, at least 300")
    add("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    add("--layers", type=int, default=4, help="number of layers")
    add("--context", type=int, default=1024, help="longest prompt plus response, in tokens")
    return parser


def texts(input_dir: str, split: str) -> Iterator[str]:
    """Yield the text of every turn."""
    for row in stream_prompts(input_dir, split):
        for turn in row["chosen"]:
            yield turn["content"]


def make_tokenizer(options: Any) -> Any:
    """Return a byte-level BPE tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(options.input_dir, options.split), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=special[1:2],
        model_max_length=options.context,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.vocab < 300 or options.layers < 1 or options.context < 1:
        raise InputError("vocab must be 300 or more, layers and context 1 or more: correct the flag")
    if options.hidden < 64 or options.hidden % 64:
        raise InputError(f"hidden is {options.hidden}: set it to a multiple of 64")
    from transformers import LlamaConfig

    tokenizer = make_tokenizer(options)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    tokenizer.save_pretrained(options.output_dir)
    config.save_pretrained(options.output_dir)
    say(f"wrote a tokenizer of {len(tokenizer)} tokens and a configuration to {options.output_dir}")


if __name__ == "__main__":
    run_program(main)
