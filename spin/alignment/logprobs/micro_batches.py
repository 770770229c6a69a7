"""From the pairs of an optimiser step to its micro-batches: the same number in every process, whatever their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spin.alignment.logprobs.batch import Feature, PackedBatch
from spin.alignment.logprobs.collators import Collator, PackedCollator
from spin.alignment.logprobs.plans import plan_by_pairs, plan_by_tokens, stretch_plan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass takes. ``counted`` is false for one that only keeps the other processes company."""

    batch: PackedBatch | dict[str, Tensor]
    pairs: int
    counted: bool = True


@dataclass(frozen=True)
class MicroBatcher:
    """Cuts a list of pairs by token budget when they are packed, by number of pairs when they are padded."""

    collator: Collator
    token_budget: int
    pairs: int

    def plan(self, features: Sequence[Feature]) -> list[list[int]]:
        """Return the pairs of each micro-batch, by their index."""
        if isinstance(self.collator, PackedCollator):
            return plan_by_tokens([self.collator.tokens(feature) for feature in features], self.token_budget)
        return plan_by_pairs(len(features), self.pairs)

    def micro_batches(
        self, features: Sequence[Feature], accelerator: Accelerator, counted: bool = True
    ) -> list[MicroBatch]:
        """Return the micro-batches of some pairs, on the device. Every process must call it, one without pairs of its own with
        a stand-in that is not ``counted``.
        """
        plan = self.plan(features) if counted else [[]]
        if accelerator.num_processes > 1:
            counts = accelerator.gather(torch.tensor([len(plan)], device=accelerator.device))
            plan = stretch_plan(plan, int(counts.max()))
        return [self.collate(features, indices, accelerator.device) for indices in plan]

    def collate(self, features: Sequence[Feature], indices: Sequence[int], device: torch.device) -> MicroBatch:
        """Return one micro-batch; without indices the first pair stands in and is not counted."""
        chosen = [features[index] for index in indices or [0]]
        batch = self.collator(chosen)
        moved = (
            batch.to(device)
            if isinstance(batch, PackedBatch)
            else {name: value.to(device) for name, value in batch.items()}
        )
        return MicroBatch(moved, len(indices), counted=bool(indices))
