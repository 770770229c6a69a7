"""Sorting ten letters out of sixteen, ``cab...`` -> ``abc...``: the data of the demos with rewards.

Few rows have the answer written out (400 in ``train``, 500 in ``test``). The 40,000 prompts of ``prompts/`` have none:
``sorting_checker.py`` decides whether a response is right. ``plenty/`` has 6,000 answered rows, for the regime in which
supervised fine-tuning is the better choice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from spin.alignment.core.files import share_files
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.rows import PROMPT_SCHEMA
from spin.alignment.pipeline.demos.tiny_model import SPECIAL, character_tokenizer, tiny_llama

LETTERS = "abcdefghijklmnop"
LENGTH = 10
NUM_TRAIN, NUM_TEST, NUM_PLENTY, NUM_PROMPTS, NUM_PARTS = 400, 500, 6_000, 40_000, 8
SEED = 0


def problems() -> Iterator[str]:
    """Yield distinct words of random letters, endlessly."""
    draw, seen = random.Random(SEED), set[str]()
    while True:
        word = "".join(draw.choices(LETTERS, k=LENGTH))
        if word not in seen:
            seen.add(word)
            yield word


def row(word: str, answered: bool) -> dict[str, object]:
    """Return a prompt row, with the answer if ``answered``."""
    turns = [{"role": "user", "content": word}]
    if answered:
        turns.append({"role": "assistant", "content": "".join(sorted(word))})
    return {"prompt_id": word, "chosen": turns}


def write_data(output_dir: Path) -> str:
    """Write test, train, prompts/ and plenty/ (parquet) and model/ into ``output_dir``; return a sentence about them."""
    words = problems()
    parts = [
        (f"prompts/train-{part:05d}-of-{NUM_PARTS:05d}", NUM_PROMPTS // NUM_PARTS, False) for part in range(NUM_PARTS)
    ]
    files = [("test", NUM_TEST, True), ("train", NUM_TRAIN, True), *parts, ("plenty/train", NUM_PLENTY, True)]
    for name, count, answered in files:
        path = output_dir / f"{name}.parquet"
        split = path.stem.partition("-")[0]
        provenance = Provenance("prompts", split=split, sampling={"task": "sorting letters", "seed": SEED})
        with ParquetSink(path, PROMPT_SCHEMA, provenance) as sink:
            sink.write([row(next(words), answered) for _ in range(count)])
    tokenizer = character_tokenizer(LETTERS)
    tokenizer.save_pretrained(output_dir / "model")
    tiny_llama(len(SPECIAL) + len(LETTERS), hidden=96, feed_forward=256).save_pretrained(output_dir / "model")
    share_files(output_dir / "model")
    return (
        f"wrote {NUM_TRAIN} (and {NUM_PLENTY}) answered training rows, {NUM_TEST} test rows, {NUM_PROMPTS} prompts without an "
        f"answer and the model configuration to {output_dir}"
    )
