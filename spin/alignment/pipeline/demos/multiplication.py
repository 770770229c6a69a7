"""Two-digit multiplication with the steps written out, ``34*27`` -> ``680+238=918``: the data of the SPIN and WSPIN demos.

The repository and the wheel ship what this writes as ``data/iter0``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from spin.alignment.core.files import share_files
from spin.alignment.core.parquet import ParquetSink
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.rows import PROMPT_SCHEMA
from spin.alignment.pipeline.demos.tiny_model import character_tokenizer, tiny_llama

NUM_TEST = 500
SEED = 0
CHARACTERS = "0123456789+*= "
# 1 / sqrt(width): with transformers' 0.02 the first layers of so narrow a model pass on next to nothing, and how soon it starts
# to learn differs from seed to seed and from machine to machine.
INITIALIZER_RANGE = 0.1


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


def write_data(output_dir: Path) -> str:
    """Write train.parquet, test.parquet and model/ into ``output_dir``; return a sentence about them."""
    rows = list(problems())
    for split, part in (("test", rows[:NUM_TEST]), ("train", rows[NUM_TEST:])):
        provenance = Provenance("prompts", split=split, sampling={"task": "two-digit multiplication", "seed": SEED})
        with ParquetSink(output_dir / f"{split}.parquet", PROMPT_SCHEMA, provenance) as sink:
            sink.write(part)
    tokenizer = character_tokenizer(CHARACTERS)
    tokenizer.save_pretrained(output_dir / "model")
    tiny_llama(len(tokenizer), initializer_range=INITIALIZER_RANGE).save_pretrained(output_dir / "model")
    share_files(output_dir / "model")
    return (
        f"wrote {len(rows) - NUM_TEST} training and {NUM_TEST} test prompts and the model configuration to {output_dir}"
    )
