"""The prompts of online training: encoded once, those that are too long counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spin.alignment.data import load_prompts, prompts_hash
from spin.alignment.errors import InputError
from spin.alignment.fractions import fraction_rows
from spin.alignment.provenance import hash_text

if TYPE_CHECKING:
    from spin.alignment.chat import ChatEncoder
    from spin.alignment.configs import DataConfig


@dataclass(frozen=True)
class OnlinePrompt:
    """One prompt: its ids (generation prompt included), its turns, and the ground truth's conversation where there is one."""

    prompt_id: str
    token_ids: tuple[int, ...]
    messages: list[dict[str, str]]
    truth: list[dict[str, str]] | None

    @property
    def reference(self) -> str | None:
        """The text of the ground truth."""
        return None if self.truth is None else self.truth[-1]["content"]


class PromptDataset(torch.utils.data.Dataset):
    """The prompts of a split, in order; ``key`` is a hash of what they say."""

    def __init__(self, prompts: Sequence[OnlinePrompt], key: str) -> None:
        self.prompts, self.key = list(prompts), key

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> OnlinePrompt:
        return self.prompts[index]


def load_splits(
    data: DataConfig, encoder: ChatEncoder, seed: int
) -> tuple[dict[str, PromptDataset], dict[str, dict[str, int]]]:
    """Load, mix and encode the prompts; return the splits (train, and test where named) and what was left out of each.

    Raises:
        InputError: no training split is named, a row cannot be encoded, or no prompt is short enough.
    """
    found: dict[str, list[OnlinePrompt]] = {}
    keys: dict[str, list[str]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for split in data.dataset_splits:
        name = "test" if split.startswith("test") else "train"
        for source, fraction in data.dataset_mixer.items():
            rows = load_prompts(source, split)
            if isinstance(fraction, bool) or not 0 < fraction <= 1:
                raise InputError(f"dataset_mixer gives {source} the fraction {fraction}: set it above 0 and at most 1")
            if name == "train" and fraction < 1:
                rows = rows.shuffle(seed=seed).select(range(max(1, int(fraction * len(rows)))))
            prompts = [encode(row, encoder, source) for row in rows]
            short = [prompt for prompt in prompts if len(prompt.token_ids) <= data.max_prompt_length]
            found.setdefault(name, []).extend(short)
            keys.setdefault(name, []).append(prompts_hash(rows))
            if len(short) < len(prompts):
                reason = f"prompt above max_prompt_length {data.max_prompt_length}"
                counts = left_out.setdefault(name, {})
                counts[reason] = counts.get(reason, 0) + len(prompts) - len(short)
    if "train" not in found:
        raise InputError(f"dataset_splits is {list(data.dataset_splits)}: name a training split such as train")
    for name, prompts in found.items():
        if not prompts:
            raise InputError(
                f"no prompt of the {name} split has {data.max_prompt_length} tokens or fewer: raise max_prompt_length"
            )
    return {name: PromptDataset(prompts, hash_text(*keys[name])) for name, prompts in found.items()}, left_out


def encode(row: dict[str, Any], encoder: ChatEncoder, source: str) -> OnlinePrompt:
    """Encode one prompt row; a row without ground truth ends with the user's turn."""
    conversation = [dict(turn) for turn in row["chosen"]]
    truth = conversation if conversation[-1]["role"] == "assistant" else None
    messages = conversation if truth is None else conversation[:-1]
    try:
        ids = encoder.prompt_ids(messages)
    except InputError as error:
        raise InputError(f"{source}, prompt {row['prompt_id']}: {error}") from error
    return OnlinePrompt(row["prompt_id"], tuple(ids), messages, truth)


def limit(splits: dict[str, PromptDataset], most: int) -> dict[str, PromptDataset]:
    """Return the splits with at most so many held-out prompts, the same ones every time; 0 keeps all."""
    held_out = splits.get("test")
    if held_out is None or not most or most >= len(held_out):
        return splits
    chosen = fraction_rows(len(held_out), 0, most)
    return splits | {"test": PromptDataset([held_out[index] for index in chosen], f"{held_out.key}-{most}")}
