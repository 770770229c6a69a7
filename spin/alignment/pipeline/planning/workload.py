"""How many prompts a run has and how long they are: from the data where it can be read, else assumed, which is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.planning.arithmetic import Lengths

_SAMPLED = 256  # rows whose lengths are read
_CHARACTERS = 4.0  # per token, if no tokenizer is at hand: English under today's vocabularies
ASSUMED_TEST = 500  # held-out prompts
ASSUMED = Lengths(prompt=200, ground_truth=250, response=250)  # where nothing is known: one turn of UltraChat


@dataclass(frozen=True)
class Split:
    """One split of prompts. ``source`` says where the numbers come from."""

    prompts: int
    lengths: Lengths
    source: str


def read_split(path: str, split: str, tokenizer: Path | None) -> Split | None:
    """Return the size of a split and the mean lengths of its first rows; None if the data is not on this machine.

    Raises:
        InputError: there is data that cannot be read.
    """
    from spin.alignment.data.rows import stream_prompts
    from spin.alignment.data.source_files import split_files
    from spin.alignment.data.source_names import is_local

    if not is_local(path):
        return None
    sampled = list(islice(stream_prompts(path, split, ground_truth_required=False), _SAMPLED))
    if not sampled:
        raise InputError(f"{path} has no prompts in its split {split}: give a split with rows")
    files = split_files(path, split)
    if len(sampled) < _SAMPLED:
        prompts = len(sampled)
    elif all(file.suffix == ".parquet" for file in files):
        from spin.alignment.core.parquet import open_parquet

        prompts = sum(open_parquet(file).metadata.num_rows for file in files)
    else:
        prompts = sum(1 for _ in stream_prompts(path, split, ground_truth_required=False))
    count, how = _counter(tokenizer)
    texts = [_texts(row["chosen"]) for row in sampled]
    prompt, answer = (sum(count(text[side]) for text in texts) / len(texts) for side in (0, 1))
    characters = sum(len(part.encode()) for text in texts for part in text)
    lengths = Lengths(prompt, answer, answer, characters / max(1.0, (prompt + answer) * len(texts)))
    return Split(prompts, lengths, f"{path}, split {split}; lengths of {len(texts)} rows, {how}")


def _texts(turns: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the text of the prompt and of the ground truth, which is empty if there is none."""
    contents = [str(turn.get("content") or "") for turn in turns]
    answered = turns[-1]["role"] == "assistant"
    return ("\n".join(contents[:-1]), contents[-1]) if answered else ("\n".join(contents), "")


def _counter(tokenizer: Path | None) -> tuple[Callable[[str], float], str]:
    """Return a function that counts the tokens of a text, and what to say about it."""
    if tokenizer is None or not tokenizer.is_file():
        return lambda text: len(text) / _CHARACTERS, f"at {_CHARACTERS:g} characters per token (no tokenizer here)"
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{tokenizer} is not a tokenizer ({error}): copy the model folder again") from error
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids), "counted by the model's tokenizer"


def given_split(
    found: Split | None, name: str, prompts: int | None, prompt_tokens: float | None, response_tokens: float | None
) -> Split:
    """Return a split with the numbers that the user gives in place of those found, and assumptions for what nobody knows.

    Raises:
        InputError: the data is not here and the number of prompts is not given.
    """
    if found is None:
        if prompts is None:
            raise InputError(f"{name} is not on this machine, so its prompts cannot be counted: give --prompts")
        found = Split(prompts, ASSUMED, f"{name} is not here: {prompts:,} prompts and lengths are assumed, or given")
    lengths, said = found.lengths, found.source
    if prompt_tokens is not None:
        lengths, said = replace(lengths, prompt=prompt_tokens), f"{said}; --prompt_tokens"
    if response_tokens is not None:
        lengths = replace(lengths, ground_truth=response_tokens, response=response_tokens)
        said = f"{said}; --response_tokens"
    return Split(found.prompts if prompts is None else prompts, lengths, said)
