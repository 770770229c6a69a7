"""Pairs as tensors: prompt-shared packed rows by default, padded rows on request, and micro-batches by token budget.

Masks are made from lengths, never by comparing ids: a pad id may equal EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from spin.alignment.attention import PackedLayout, Tree
from spin.alignment.losses import LossInputs

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.reference import ReferenceLogps

HALVES = ("chosen", "rejected")
Feature = Mapping[str, Any]

# Feature of a response -> what the losses call it: one number for each response.
LABELS = {"win_prob": "win_probs", "reward": "rewards"}

# Logits of one group of pairs, in elements: large matmuls, and still small beside the activations.
GROUP_ELEMENTS = 2**26


class PairDataset(torch.utils.data.Dataset):
    """Encoded pairs, each with the opponent's log-probs once they are attached.

    ``rows`` has the columns prompt_ids, chosen_ids, rejected_ids and, when tokens are weighted, chosen_weights and
    rejected_weights; for a loss that reads them the labels chosen_win_prob and rejected_win_prob, or chosen_reward and
    rejected_reward.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.reference: ReferenceLogps | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        feature = dict(self.rows[index])
        if self.reference is not None:
            feature["chosen_reference"], feature["rejected_reference"] = self.reference[index]
        return feature


class PairList:
    """The pairs of one optimiser batch of one process, as the data loader hands them over: not yet tensors.

    ``stands_in``: the process has no pair of its own, and these only keep the others company.
    """

    def __init__(self, features: Sequence[Feature], stands_in: bool = False) -> None:
        self.features = list(features)
        self.stands_in = stands_in

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class PairGroup:
    """b pairs whose response tokens are neighbours in the batch: all chosen responses, then all rejected ones.

    ``rows`` is their slice of the N response tokens; ``completion_mask`` has shape ``(2b, R)``; ``reference_logps`` (nats)
    and ``weights`` have it too, where the data has them; ``win_probs`` and ``rewards`` have shape ``(2b,)``.
    """

    rows: slice
    completion_mask: torch.Tensor
    reference_logps: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    win_probs: torch.Tensor | None = None
    rewards: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        return len(self.completion_mask) // 2

    def loss_inputs(self, logps: torch.Tensor, kl: torch.Tensor | None = None) -> LossInputs:
        """Return the streams of the losses for log-probs, and KL where it is known, ``(n,)`` in the order of ``rows``."""
        assert self.reference_logps is not None
        policy, position_kl = (
            None
            if flat is None
            else flat.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, flat)
            for flat in (logps, kl)
        )
        assert policy is not None
        labels = {name: getattr(self, name) for name in LABELS.values()}
        return LossInputs(policy, self.reference_logps, self.completion_mask, self.weights, position_kl, **labels)

    def responses(self, logps: torch.Tensor) -> list[torch.Tensor]:
        """Return the log-probs of each response, without padding: b chosen ones, then b rejected ones."""
        return list(logps.split(self.completion_mask.sum(dim=1).tolist()))

    def to(self, device: torch.device) -> PairGroup:
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("completion_mask", "reference_logps", "weights", *LABELS.values())
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedBatch:
    """Pairs in one row of T tokens without padding.

    ``input_ids`` and ``position_ids`` have shape ``(1, T)``; ``predictors`` (N,) gives the position in the row whose hidden
    state predicts each response token, ``targets`` (N,) the token. ``groups`` cut the N tokens into groups of whole pairs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    predictors: torch.Tensor
    targets: torch.Tensor
    groups: tuple[PairGroup, ...]

    def to(self, device: torch.device) -> PackedBatch:
        names = ("input_ids", "position_ids", "predictors", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        layout = PackedLayout(self.layout.trees, device, self.layout.kernel)
        return replace(self, **moved, layout=layout, groups=tuple(group.to(device) for group in self.groups))


@dataclass(frozen=True)
class PackedCollator:
    """Packs B pairs into one row. With the pairs ``[1 2 | 3 | 4 5]`` and ``[6 | 7 8 | 9]`` (prompt | chosen | rejected)::

        input_ids      1 2 3 4 5 6 7 8 9
        position_ids   0 1 2 2 3 0 1 2 1
        targets        3 7 8 4 5 9          (chosen of both pairs, rejected of both pairs)
        predictors     1 5 6 1 3 5

    ``share_prompts=False`` writes the prompt in front of the rejected response once more. ``vocab_size`` sets how many pairs
    a group of logits holds.
    """

    kernel: str = "sdpa"
    vocab_size: int = 32_000
    share_prompts: bool = True

    def tokens(self, feature: Feature) -> int:
        """Return how many tokens of a row a pair takes."""
        prompt, chosen, rejected = (len(feature[f"{name}_ids"]) for name in ("prompt", *HALVES))
        return prompt + chosen + rejected + (0 if self.share_prompts else prompt)

    def __call__(self, features: Sequence[Feature]) -> PackedBatch:
        """Return the packed row of some pairs, in their order."""
        ids: list[int] = []
        positions: list[int] = []
        trees: list[Tree] = []
        starts: list[tuple[list[int], list[int]]] = []  # of each pair: the predictors of its two responses
        for feature in features:
            prompt, *responses = (list(feature[f"{name}_ids"]) for name in ("prompt", *HALVES))
            predictors: list[list[int]] = []
            for number, response in enumerate(responses):
                if number == 0 or not self.share_prompts:
                    last_of_prompt = len(ids) + len(prompt) - 1
                    ids += prompt
                    positions += range(len(prompt))
                predictors.append([last_of_prompt, *range(len(ids), len(ids) + len(response) - 1)])
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
            lengths = tuple(map(len, responses))
            shared = (lengths,) if self.share_prompts else tuple((length,) for length in lengths)
            trees += [Tree(len(prompt), branches) for branches in shared]
            starts.append((predictors[0], predictors[1]))
        groups, order = self._groups(features)
        picked = [position for number, half in order for position in starts[number][half]]
        labels = [token for number, half in order for token in features[number][f"{HALVES[half]}_ids"]]
        return PackedBatch(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            layout=PackedLayout(tuple(trees), torch.device("cpu"), self.kernel),
            predictors=torch.tensor(picked),
            targets=torch.tensor(labels),
            groups=groups,
        )

    def _groups(self, features: Sequence[Feature]) -> tuple[tuple[PairGroup, ...], list[tuple[int, int]]]:
        """Cut the pairs into groups; return them and the order (pair, half) of the responses."""
        limit = max(1, GROUP_ELEMENTS // self.vocab_size)
        lengths = [len(feature["chosen_ids"]) + len(feature["rejected_ids"]) for feature in features]
        groups, order, start = [], [], 0
        for numbers in consecutive(lengths, limit):
            rows = slice(start, start := start + sum(lengths[number] for number in numbers))
            groups.append(_group([features[number] for number in numbers], rows))
            order += [(number, half) for half in (0, 1) for number in numbers]
        return tuple(groups), order


def consecutive(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut indices into runs whose sizes add up to at most a limit; an index that exceeds it stands alone."""
    runs: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not runs or total + size > limit:
            runs.append([])
            total = 0
        runs[-1].append(index)
        total += size
    return runs


def _group(features: Sequence[Feature], rows: slice) -> PairGroup:
    responses = [feature[f"{half}_ids"] for half in HALVES for feature in features]
    width = max(map(len, responses))
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(width) < lengths[:, None]
    return PairGroup(rows, mask, **_streams(features, responses, width), **_labels(features))


def _streams(features: Sequence[Feature], responses: Sequence[Sequence[int]], width: int) -> dict[str, torch.Tensor]:
    """Return reference_logps and weights of shape ``(2B, width)``, as far as the features have them."""
    streams = {}
    for name, column in (("reference_logps", "reference"), ("weights", "weights")):
        if f"chosen_{column}" in features[0]:
            values = [feature[f"{half}_{column}"] for half in HALVES for feature in features]
            streams[name] = pad_streams(values, responses, width)
    return streams


def _labels(features: Sequence[Feature]) -> dict[str, torch.Tensor]:
    """Return win_probs and rewards of shape ``(2B,)``, float64, as far as the features have them."""
    return {
        name: torch.tensor(
            [feature[f"{half}_{column}"] for half in HALVES for feature in features], dtype=torch.float64
        )
        for column, name in LABELS.items()
        if f"chosen_{column}" in features[0]
    }


@dataclass(frozen=True)
class PairCollator:
    """Stacks B pairs into tensors of 2B padded rows: the chosen half, then the rejected half, in the same order.

    Prompts are padded on the left and responses on the right, so every response starts in one column. With the pairs
    ``[1 2 | 3 | 4 5]`` and ``[6 | 7 8 | 9]`` (prompt | chosen | rejected) and pad id 0::

        input_ids        1 2 3 0      completion_mask  1 0
                         0 6 7 8                       1 1
                         1 2 4 5                       1 1
                         0 6 9 0                       1 0
    """

    pad_id: int

    def tokens(self, feature: Feature) -> int:
        """Return how many distinct tokens a pair has; padding is left out."""
        return sum(len(feature[f"{name}_ids"]) for name in ("prompt", *HALVES))

    def __call__(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and position_ids of shape ``(2B, P + R)`` and, of shape ``(2B, R)``,
        completion_mask and, as far as the features have them, reference_logps (nats) and weights; of shape ``(2B,)`` the
        labels win_probs and rewards.
        """
        prompts = [feature["prompt_ids"] for _ in HALVES for feature in features]
        responses = [feature[f"{half}_ids"] for half in HALVES for feature in features]
        width, height = max(map(len, responses)), len(prompts)
        left = max(map(len, prompts))
        input_ids = torch.full((height, left + width), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, end = left - len(prompt), left + len(response)
            input_ids[row, start:end] = torch.tensor([*prompt, *response])
            attention_mask[row, start:end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "completion_mask": attention_mask[:, left:].clone(),
            **_streams(features, responses, width),
            **_labels(features),
        }


Collator = PackedCollator | PairCollator


def pad_streams(streams: Sequence[Sequence[float]], responses: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Return float32 streams of shape ``(2B, width)``, zero behind the end of each response.

    Raises:
        ValueError: a stream is not as long as its response.
    """
    padded = torch.zeros(len(streams), width)
    for row, (stream, response) in enumerate(zip(streams, responses, strict=True)):
        if len(stream) != len(response):
            raise ValueError(f"a stream of {len(stream)} values does not fit a response of {len(response)} tokens")
        padded[row, : len(stream)] = torch.tensor(stream, dtype=torch.float32)
    return padded


def plan_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute pairs over as few micro-batches as possible (first fit, longest first); none holds more tokens than the
    budget, unless a single pair does.
    """
    plan: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = next((number for number, free in enumerate(room) if free >= sizes[index]), None)
        if fitting is None:
            plan.append([index])
            room.append(budget - sizes[index])
        else:
            plan[fitting].append(index)
            room[fitting] -= sizes[index]
    return [sorted(indices) for indices in plan]


def plan_by_pairs(number: int, pairs: int) -> list[list[int]]:
    """Cut pairs into micro-batches of a fixed number of pairs, in their order."""
    return [list(range(start, min(start + pairs, number))) for start in range(0, number, pairs)]


def stretch_plan(plan: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return a plan of exactly ``count`` micro-batches: the fullest are halved; where single pairs are left, empty
    micro-batches are added. Processes that share collectives must take the same number of forwards.
    """
    stretched = [list(indices) for indices in plan]
    while len(stretched) < count:
        fullest = max(range(len(stretched)), key=lambda number: len(stretched[number]))
        indices = stretched[fullest]
        half = len(indices) // 2
        stretched[fullest : fullest + 1] = [indices[half:], indices[:half]]
    return stretched
