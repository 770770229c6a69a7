"""How many prompts a run has and how long they are: from the data where it can be read, else assumed, which is said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.conversation_text import RowRefused
from spin.alignment.data.turns import prompt_turns
from spin.alignment.pipeline.planning.arithmetic import Lengths

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

_SAMPLED = 256  # rows whose lengths are read
_CHARACTERS = 4.0  # per token, if the model is not here: English under today's vocabularies
ASSUMED_TEST = 500  # held-out prompts
ASSUMED = Lengths(prompt=200, ground_truth=250, response=250)  # where nothing is known: one turn of UltraChat


@dataclass(frozen=True)
class Split:
    """One split of prompts. ``source`` says where the numbers come from."""

    prompts: int
    lengths: Lengths
    source: str


def read_split(path: str, split: str, encoder: ChatEncoder | None) -> Split | None:
    """Return the size of a split and the mean lengths of its first rows; None if the data is not on this machine.

    ``encoder`` is that of the model; without one, lengths follow from the number of characters.

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
    counts = [found for row in sampled if (found := _count(row, encoder)) is not None]
    if not counts:
        raise InputError(f"the chat template refuses the first {len(sampled)} rows of {path}: check it with spin run")
    prompt, answer, size = (sum(column) / len(counts) for column in zip(*counts, strict=True))
    lengths = Lengths(prompt, answer, answer, size / max(1.0, prompt + answer))
    how = f"at {_CHARACTERS:g} characters per token" if encoder is None else "rendered by the model's chat template"
    return Split(prompts, lengths, f"{path}, split {split}; lengths of {len(counts)} rows, {how}")


def _count(row: dict[str, Any], encoder: ChatEncoder | None) -> tuple[float, float, int] | None:
    """Return the tokens of a row's prompt and ground truth and the bytes of its text; None if the template refuses the row."""
    from spin.alignment.data.chat_encoder import template_arguments

    turns = row["chosen"]
    before = prompt_turns(turns)
    sizes = [sum(len(str(turn.get("content") or "")) for turn in part) for part in (before, turns[len(before) :])]
    size = sum(len(str(turn.get("content") or "").encode()) for turn in turns)
    if encoder is None:
        return sizes[0] / _CHARACTERS, sizes[1] / _CHARACTERS, size
    arguments = template_arguments(row)
    try:
        prompt = encoder.prompt_ids(before, **arguments)
        answer = encoder.response_ids(turns, prompt, **arguments) if len(before) < len(turns) else []
    except RowRefused:
        return None
    return len(prompt), len(answer), size


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
