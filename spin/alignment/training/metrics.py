"""What is logged about pairs: sums kept on the device, averaged over all pairs of all processes when they are logged."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spin.alignment.methods.losses import LossInputs, LossOutputs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "drift/chosen",
    "drift/chosen_per_token",
    "pairs",
    "tokens",
)


@dataclass(frozen=True)
class PairAverages:
    """Averages over pairs under their standard names, and how many pairs and completion tokens they come from."""

    values: dict[str, float]
    pairs: int
    tokens: int


class PairMetrics:
    """Collects groups of pairs until they are averaged."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, inputs: LossInputs, outputs: LossOutputs, losses: Tensor) -> None:
        """Add b pairs: their streams of shape ``(2b, R)`` and their losses of shape ``(b,)``."""
        mask = inputs.completion_mask
        chosen_mask, _ = mask.chunk(2)
        chosen, rejected = inputs.policy_logps.detach().double().sum(dim=-1).chunk(2)
        start, _ = inputs.reference_logps.double().sum(dim=-1).chunk(2)
        margins = outputs.chosen_rewards - outputs.rejected_rewards
        values = {
            "loss": losses.detach(),
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "rewards/accuracies": (margins > 0).double(),
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "drift/chosen": chosen - start,
            "drift/chosen_per_token": (chosen - start) / chosen_mask.sum(dim=-1),
            "pairs": torch.ones_like(margins),
            "tokens": mask.sum().double(),
        }
        for name in _NAMES:
            self._sums[name].append(values[name].double().sum())

    def take(self, accelerator: Accelerator) -> PairAverages | None:
        """Return the averages over all processes and start anew; None when nothing was added in any of them.

        Every process must call it, one that added nothing too: the others wait for it in the reduction.
        """
        if self._sums:
            # float64 sums would not cross every backend (MPS); float32 is enough for a mean of pairs.
            local = torch.stack([torch.stack(self._sums[name]).sum() for name in _NAMES]).float()
        else:
            local = torch.zeros(len(_NAMES), device=accelerator.device)
        self._sums.clear()
        totals = accelerator.reduce(local, reduction="sum").double()
        total = dict(zip(_NAMES, totals.tolist(), strict=True))
        pairs, tokens = total.pop("pairs"), total.pop("tokens")
        if not pairs:
            return None
        return PairAverages({name: value / pairs for name, value in total.items()}, int(pairs), int(tokens))
