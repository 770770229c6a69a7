"""Divides the pairs of an optimiser step into micro-batches, the same number in every process."""

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
    """The input of one forward and backward pass; not ``counted`` if it only keeps this process in step with the others.

    ``features`` are its pairs, in the order of the loss's streams.
    """

    batch: PackedBatch | dict[str, Tensor]
    pairs: int
    counted: bool = True
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class MicroBatcher:
    """Divides a list of pairs by token budget if they are packed, by number of pairs if they are padded."""

    collator: Collator
    token_budget: int
    pairs: int

    def plan(self, features: Sequence[Feature]) -> list[list[int]]:
        """Return the indices of the pairs in each micro-batch."""
        if isinstance(self.collator, PackedCollator):
            return plan_by_tokens([self.collator.tokens(feature) for feature in features], self.token_budget)
        return plan_by_pairs(len(features), self.pairs)

    def micro_batches(
        self, features: Sequence[Feature], accelerator: Accelerator, counted: bool = True
    ) -> list[MicroBatch]:
        """Return the micro-batches of some pairs, on the device. Every process must call it; a process without pairs passes a
        placeholder that is not ``counted``.
        """
        plan = self.plan(features) if counted else [[]]
        if accelerator.num_processes > 1:
            # Each forward pass is a collective operation under ZeRO-3 and FSDP: with unequal numbers the processes would hang.
            counts = accelerator.gather(torch.tensor([len(plan)], device=accelerator.device))
            plan = stretch_plan(plan, int(counts.max()))
        return [self.collate(features, indices, accelerator.device) for indices in plan]

    def collate(self, features: Sequence[Feature], indices: Sequence[int], device: torch.device) -> MicroBatch:
        """Return one micro-batch; without indices it consists of the first pair and is not counted."""
        # An uncounted batch still needs tensors, because its forward pass takes part in collectives; its loss is dropped.
        chosen = [features[index] for index in indices or [0]]
        batch = self.collator(chosen)
        moved = (
            batch.to(device)
            if isinstance(batch, PackedBatch)
            else {name: value.to(device) for name, value in batch.items()}
        )
        return MicroBatch(moved, len(indices), bool(indices), tuple(chosen))
