"""What the tests of estimate_weights.py share: pairs, models that weigh them, and log-probs by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin import estimate_weights
from spin.alignment.core.parquet import read_rows
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.chat_encoder import ChatEncoder
from tests.helpers import char_tokenizer, run_main, save_tiny_model, tiny_llama

ANSWERS = ["red", "green tea", "7", "eleven!", "a longer answer here", " blue "]


def write_pairs(folder: Path, count: int = 10, files: int = 2, **changes) -> Path:
    """Preference parquet in two files as convert_data.py writes it; every third response was cut by length."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder(char_tokenizer())
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"say word {number}"}]
        said, cut = ANSWERS[(number + 1) % 6], number % 3 == 2
        ids = encoder.tokenizer(said, add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "prompt_id": f"p{number}",
                "sample_index": 0,
                "chosen": [*prompt, {"role": "assistant", "content": ANSWERS[number % 6]}],
                "rejected": [*prompt, {"role": "assistant", "content": said}],
                "rejected_token_ids": ids if cut else [*ids, encoder.end_id],
                "rejected_finish_reason": "length" if cut else "stop",
                **changes,
            }
        )
    from spin.alignment.data.rows import PREFERENCE_SCHEMA

    per_file = -(-count // files)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number * per_file : (number + 1) * per_file], PREFERENCE_SCHEMA)
        schema = Provenance(kind="preferences", split="train", iteration=3).attach(table.schema)
        pq.write_table(table.cast(schema), folder / f"train_prefs-{number:05d}-of-{files:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def scoring_models(tmp_path_factory) -> Path:
    """Pairs, and four models: two of one tokenizer, a teacher with another one, and one with a word tokenizer."""
    root = tmp_path_factory.mktemp("weights")
    write_pairs(root / "pairs")
    save_tiny_model(root / "plus", seed=1)
    save_tiny_model(root / "minus", seed=2)
    save_teacher(root / "teacher")
    return root


def save_teacher(folder: Path) -> None:
    """A model whose tokenizer cuts into pieces of words, with a template of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "re",
        "een",
        " te",
        "a ",
        "lo",
        "ng",
        "an",
        "sw",
        "er",
        "el",
        "ev",
        "e",
        "n",
        "!",
        "bl",
        "ue",
        "d",
        "gr",
        "h",
    ]
    letters = sorted({letter for text in [*ANSWERS, "say word 0123456789", "USER:ASSISTANT "] for letter in text})
    tokens = ["<s>", "</s>", "<unk>", *dict.fromkeys([*pieces, *letters])]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(pieces) + "|."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['role'] | upper }}:{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    tiny_llama(len(tokenizer), seed=5, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weigh(scoring_models: Path, output: Path, *arguments: object, pairs: str = "pairs") -> tuple[int, str, str]:
    return run_main(
        estimate_weights.main,
        "--input_dir",
        scoring_models / pairs,
        "--output_dir",
        output,
        *(["--dtype", "float32"] if {"reverse_dpo", "teacher"} & set(arguments) else []),
        *arguments,
    )


def models(scoring_models: Path, plus: str = "plus", minus: str = "minus") -> list[object]:
    return ["--model_plus", scoring_models / plus, "--model_minus", scoring_models / minus]


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("train_prefs-*.parquet")) for row in read_rows(file)]


def logps_by_hand(folder: Path, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Float64 log-probs through the model's own forward, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[range(len(ids)), ids].numpy()


@pytest.fixture(scope="module")
def weighed(scoring_models, tmp_path_factory) -> Path:
    """The output of reverse_dpo with the default transform."""
    output = tmp_path_factory.mktemp("weighed") / "out"
    code, _, err = weigh(
        scoring_models, output, "--weighting", "reverse_dpo", *models(scoring_models), "--page", output / "page.html"
    )
    assert code == 0, err
    return output
