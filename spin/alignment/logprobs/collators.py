"""Collating pairs, or sequences of a single response, to tensors: packed into one row with shared prompts, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import torch

from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PackedLayout, Tree
from spin.alignment.logprobs.batch import GROUP_ELEMENTS, Feature, PackedBatch, PairGroup
from spin.alignment.logprobs.plans import consecutive

if TYPE_CHECKING:
    from datasets import Dataset

# Prefix of a label among the tensors of a padded batch.
LABEL = "label/"
# What a response has beside labels.
_NO_LABELS = {"ids", "mask", "reference", "weights", "sampler"}


def trained(feature: Feature, name: str) -> Sequence[int]:
    """Return the positions of a response's tokens that are predicted: those that are 1 in ``{name}_mask``, without one all."""
    mask = feature.get(f"{name}_mask")
    ids = feature[f"{name}_ids"]
    return range(len(ids)) if mask is None else [place for place, counts in enumerate(mask) if counts]


def targets(feature: Feature, name: str) -> list[int]:
    """Return the tokens of a response that are predicted, in order."""
    ids = feature[f"{name}_ids"]
    return [ids[place] for place in trained(feature, name)]


def lengths_of(rows: Dataset, names: Sequence[str]) -> list[np.ndarray]:
    """Return the number of tokens of each of N rows in ``{name}_ids``, ``(N,)`` for each name, without reading the ids."""
    table = rows.select_columns([f"{name}_ids" for name in names]).with_format("arrow")[:]
    return [pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in names]


@dataclass(frozen=True)
class PackedCollator:
    """Packs B pairs into one row. With the pairs ``[1 2 | 3 | 4 5]`` and ``[6 | 7 8 | 9]`` (prompt | chosen | rejected)::

        input_ids      1 2 3 4 5 6 7 8 9
        position_ids   0 1 2 2 3 0 1 2 1
        targets        3 7 8 4 5 9          (chosen of both pairs, rejected of both pairs)
        predictors     1 5 6 1 3 5

    Tokens that are 0 in ``{response}_mask`` are read but not predicted: the later user turns of a conversation.
    ``share_prompts=False`` repeats the prompt before every further response. ``vocab_size`` determines how many pairs are in
    a group of logits; ``responses`` are those of a row, in the order of the loss's streams.
    """

    kernel: str = "sdpa"
    vocab_size: int = 32_000
    share_prompts: bool = True
    responses: tuple[str, ...] = SIDES

    def tokens(self, feature: Feature) -> int:
        """Return the number of tokens that a pair takes in a row."""
        prompt, *responses = (len(feature[f"{name}_ids"]) for name in ("prompt", *self.responses))
        return prompt * (1 if self.share_prompts else len(responses)) + sum(responses)

    def tokens_of(self, rows: Dataset) -> np.ndarray:
        """Return :meth:`tokens` of each of N encoded pairs, ``(N,)``."""
        prompt, *responses = lengths_of(rows, ("prompt", *self.responses))
        return prompt * (1 if self.share_prompts else len(responses)) + np.sum(responses, axis=0)

    def __call__(self, features: Sequence[Feature]) -> PackedBatch:
        """Return the packed row of some pairs, in order."""
        ids: list[int] = []
        positions: list[int] = []
        trees: list[Tree] = []
        starts: list[list[list[int]]] = []  # per pair: the predictors of its responses
        for feature in features:
            prompt, *responses = (list(feature[f"{name}_ids"]) for name in ("prompt", *self.responses))
            predictors: list[list[int]] = []
            for number, (name, response) in enumerate(zip(self.responses, responses, strict=True)):
                if number == 0 or not self.share_prompts:
                    last_of_prompt = len(ids) + len(prompt) - 1
                    ids += prompt
                    positions += range(len(prompt))
                # The first response token is predicted at the end of the prompt, every other one at the token before it.
                before = [last_of_prompt, *range(len(ids), len(ids) + len(response) - 1)]
                predictors.append([before[place] for place in trained(feature, name)])
                ids += response
                # Both responses continue the positions of the prompt, as if each followed it directly.
                positions += range(len(prompt), len(prompt) + len(response))
            lengths = tuple(map(len, responses))
            shared = (lengths,) if self.share_prompts else tuple((length,) for length in lengths)
            trees += [Tree(len(prompt), branches) for branches in shared]
            starts.append(predictors)
        groups, order = self._groups(features)
        picked = [position for number, place in order for position in starts[number][place]]
        labels = [token for number, place in order for token in targets(features[number], self.responses[place])]
        return PackedBatch(
            input_ids=torch.tensor([ids]),  # (1, T)
            position_ids=torch.tensor([positions]),  # (1, T)
            layout=PackedLayout(tuple(trees), torch.device("cpu"), self.kernel),
            predictors=torch.tensor(picked, dtype=torch.long),  # (N,)
            targets=torch.tensor(labels, dtype=torch.long),  # (N,)
            groups=groups,
        )

    def _groups(self, features: Sequence[Feature]) -> tuple[tuple[PairGroup, ...], list[tuple[int, int]]]:
        """Divide the pairs into groups; return them and the order (pair, index of the response) of the responses."""
        limit = max(1, GROUP_ELEMENTS // self.vocab_size)  # response tokens per group
        lengths = [sum(len(trained(feature, name)) for name in self.responses) for feature in features]
        groups, order, start = [], [], 0
        for numbers in consecutive(lengths, limit):
            rows = slice(start, start := start + sum(lengths[number] for number in numbers))
            groups.append(_group([features[number] for number in numbers], rows, self.responses))
            order += [(number, place) for place in range(len(self.responses)) for number in numbers]
        return tuple(groups), order


def _group(features: Sequence[Feature], rows: slice, names: tuple[str, ...]) -> PairGroup:
    responses = [targets(feature, name) for name in names for feature in features]
    width = max(map(len, responses))
    lengths = torch.tensor([len(response) for response in responses])  # (2b,)
    mask = torch.arange(width) < lengths[:, None]  # (2b, R)
    streams = _streams(features, names, responses, width)
    return PairGroup(rows, mask, **streams, labels=_labels(features, names), responses=names)


def _streams(
    features: Sequence[Feature], names: Sequence[str], responses: Sequence[Sequence[int]], width: int
) -> dict[str, torch.Tensor]:
    """Return reference_logps, weights and sampler_logps of shape ``(2B, width)``, those that the features have."""
    streams = {}
    for stream, column in (("reference_logps", "reference"), ("weights", "weights"), ("sampler_logps", "sampler")):
        if f"{names[0]}_{column}" in features[0]:
            values = [feature[f"{name}_{column}"] for name in names for feature in features]
            streams[stream] = pad_streams(values, responses, width)
    return streams


def _labels(features: Sequence[Feature], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the labels of shape ``(2B,)``, float64: every column of all responses that is neither ids nor a stream."""
    first = {column.removeprefix(f"{names[0]}_") for column in features[0] if column.startswith(f"{names[0]}_")}
    return {
        label: torch.tensor([feature[f"{name}_{label}"] for name in names for feature in features], dtype=torch.float64)
        for label in sorted(first - _NO_LABELS)
    }


@dataclass(frozen=True)
class PairCollator:
    """Stacks B pairs into tensors of 2B padded rows: the chosen half, then the rejected half, in the same order.

    Prompts are padded on the left and responses on the right, so all responses start in the same column. With the pairs
    ``[1 2 | 3 | 4 5]`` and ``[6 | 7 8 | 9]`` (prompt | chosen | rejected) and pad id 0::

        input_ids        1 2 3 0      completion_mask  1 0
                         0 6 7 8                       1 1
                         1 2 4 5                       1 1
                         0 6 9 0                       1 0
    """

    pad_id: int
    responses: tuple[str, ...] = SIDES

    def tokens(self, feature: Feature) -> int:
        """Return the number of distinct tokens in a pair, without padding."""
        return sum(len(feature[f"{name}_ids"]) for name in ("prompt", *self.responses))

    def tokens_of(self, rows: Dataset) -> np.ndarray:
        """Return :meth:`tokens` of each of N encoded pairs, ``(N,)``."""
        return np.sum(lengths_of(rows, ("prompt", *self.responses)), axis=0)

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and position_ids of shape ``(2B, P + R)``, completion_mask of shape ``(2B, R)``
        and, if the features have them, reference_logps and sampler_logps (nats) and weights of shape ``(2B, R)`` and each label
        X, of shape ``(2B,)``, as ``label/X``. With k ``responses`` per row, read k for 2.
        """
        prompts = [feature["prompt_ids"] for _ in self.responses for feature in features]
        responses = [feature[f"{name}_ids"] for name in self.responses for feature in features]
        masks = [feature.get(f"{name}_mask") for name in self.responses for feature in features]
        width, height = max(map(len, responses)), len(prompts)
        left = max(map(len, prompts))
        input_ids = torch.full((height, left + width), self.pad_id, dtype=torch.long)  # (2B, P + R)
        attention_mask = torch.zeros_like(input_ids)  # (2B, P + R)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, end = left - len(prompt), left + len(response)
            input_ids[row, start:end] = torch.tensor([*prompt, *response])
            attention_mask[row, start:end] = 1
        completion_mask = attention_mask[:, left:].clone()  # (2B, R)
        for row, mask in enumerate(masks):
            if mask is not None:
                completion_mask[row, : len(mask)] = torch.tensor(mask)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            # Counted from the first real token, so that left padding does not shift positions.
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "completion_mask": completion_mask,
            **_streams(features, self.responses, responses, width),
            **{f"{LABEL}{name}": values for name, values in _labels(features, self.responses).items()},
        }


Collator = PackedCollator | PairCollator


def pad_streams(streams: Sequence[Sequence[float]], responses: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Return float32 streams of shape ``(2B, width)``, zero after the end of each response.

    Raises:
        ValueError: a stream is not as long as its response.
    """
    padded = torch.zeros(len(streams), width)  # (2B, R)
    for row, (stream, response) in enumerate(zip(streams, responses, strict=True)):
        if len(stream) != len(response):
            raise ValueError(f"a stream of {len(stream)} values does not fit a response of {len(response)} tokens")
        padded[row, : len(stream)] = torch.tensor(stream, dtype=torch.float32)
    return padded
