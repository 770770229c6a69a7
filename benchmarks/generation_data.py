"""Shared by all contenders of the generation benchmark: a random model that ends its responses, and prompts of mixed lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.shapes import EOS_ID, FIRST_WORD_ID, PAD_ID, as_text, make_tokenizer
from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    import torch

    from spin.alignment.data.chat_encoder import ChatEncoder

VOCAB_SIZE = 4096
PROMPT_TOKENS = (16, 300)
MAX_NEW_TOKENS = 192
MEAN_TOKENS = 64  # of a response that is not truncated
SPLIT = "train"
CONSTANT = 0.3  # the first number of every embedding; the other numbers have a spread of 0.02
TEMPLATE = "{% for m in messages %} {{ m['content'] }}{% if m['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"


@dataclass(frozen=True)
class Prompt:
    """One prompt as ids and as text."""

    prompt_id: str
    token_ids: list[int]

    @property
    def text(self) -> str:
        return as_text(self.token_ids).strip()


def make_prompts(count: int, turn: int, seed: int) -> list[Prompt]:
    """Return the prompts of one turn: random words, lengths uniform over ``PROMPT_TOKENS``. Each turn has different prompts."""
    rng = np.random.default_rng((seed, turn))
    shortest, longest = PROMPT_TOKENS
    lengths = rng.integers(shortest, longest + 1, count)
    return [
        Prompt(f"turn{turn}-{number}", rng.integers(FIRST_WORD_ID, VOCAB_SIZE, length).tolist())
        for number, length in enumerate(lengths)
    ]


def save_prompts(folder: Path, prompts: list[Prompt]) -> None:
    """Write prompts to a new folder as a data set with a short ground truth."""
    save_texts(folder, {one.prompt_id: one.text for one in prompts})


def save_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write prompts, by id, to a new folder as a data set with a short ground truth."""
    folder.mkdir(parents=True)
    rows = ({"prompt_id": prompt_id, "prompt": text, "response": "w2 w3"} for prompt_id, text in texts.items())
    (folder / f"{SPLIT}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_questions(file: Path, count: int) -> list[str]:
    """Return the first questions of a JSON lines file with the key ``question``, as GSM8K.

    Raises:
        InputError: the file is missing or has too few, or a line has no question.
    """
    if not file.is_file():
        raise InputError(f"the file of questions {file} does not exist: give one in the form of GSM8K's test.jsonl")
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[:count], start=1):
        row = json.loads(line)
        if "question" not in row:
            raise InputError(f"{file}, line {number}, has no key 'question': give a file in the form of GSM8K")
        questions.append(row["question"])
    if len(questions) < count:
        raise InputError(f"{file} has {len(questions)} questions, but {count} are needed: lower prompts or reps")
    return questions


def read_prompts(folder: Path, encoder: ChatEncoder) -> list[Prompt]:
    """Return the prompts of a folder of :func:`save_texts` as a model sees them."""
    rows = map(json.loads, (folder / f"{SPLIT}.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Prompt(row["prompt_id"], list(encoder.prompt_ids([{"role": "user", "content": row["prompt"]}]))) for row in rows
    ]


def save_model(folder: Path, seed: int) -> int:
    """Write a random float32 Llama whose responses have about ``MEAN_TOKENS`` tokens, and a tokenizer; return its size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=720,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    _let_responses_end(model)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def _let_responses_end(model: Any) -> None:
    """Change weights so that the stop id is sampled with probability 1 / ``MEAN_TOKENS``, regardless of the context.

    The first number of every embedding is the same and no layer adds to it, so the first number of every hidden state is also
    nearly the same. A larger one in the head's row of the stop id then acts as a bias, in every engine.
    """
    import torch

    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:, 0] = CONSTANT
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        ids = torch.randint(FIRST_WORD_ID, VOCAB_SIZE, (16, 64))
        hidden = model.model(ids).last_hidden_state.flatten(0, 1)
        weight[EOS_ID, 0] += _solve_bias(model.lm_head(hidden), hidden[:, 0])


def _solve_bias(logits: torch.Tensor, slope: torch.Tensor) -> float:
    """Return the x for which the mean probability of the stop id is 1 / ``MEAN_TOKENS`` with ``x * slope`` on its logit."""
    import torch

    others = torch.cat([logits[:, :EOS_ID], logits[:, EOS_ID + 1 :]], dim=1).logsumexp(dim=1)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        likely = torch.sigmoid(logits[:, EOS_ID] + middle * slope - others).mean() > 1 / MEAN_TOKENS
        low, high = (low, middle) if likely else (middle, high)
    return high
