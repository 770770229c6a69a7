"""Pairs as tensors. Prompts are padded on the left and responses on the right, so every response starts in one column.

Masks are made from lengths, never by comparing ids: a pad id may equal EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.reference import ReferenceLogps

HALVES = ("chosen", "rejected")


class PairDataset(torch.utils.data.Dataset):
    """Encoded pairs, each with the opponent's log-probs once they are attached.

    ``rows`` has the columns prompt_ids, chosen_ids, rejected_ids and, when tokens are weighted, chosen_weights and
    rejected_weights.
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


@dataclass(frozen=True)
class PairCollator:
    """Stacks B pairs into tensors of 2B rows: the chosen half, then the rejected half, in the same order.

    With the pairs ``[1 2 | 3 | 4 5]`` and ``[6 | 7 8 | 9]`` (prompt | chosen | rejected) and pad id 0::

        input_ids        1 2 3 0      completion_mask  1 0
                         0 6 7 8                       1 1
                         1 2 4 5                       1 1
                         0 6 9 0                       1 0
    """

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and position_ids of shape ``(2B, P + R)`` and, of shape ``(2B, R)``,
        completion_mask and, as far as the features have them, reference_logps (nats) and weights.
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
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "completion_mask": attention_mask[:, left:].clone(),
        }
        for name, column in (("reference_logps", "reference"), ("weights", "weights")):
            if f"chosen_{column}" in features[0]:
                streams = [feature[f"{half}_{column}"] for half in HALVES for feature in features]
                batch[name] = pad_streams(streams, responses, width)
        return batch


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
