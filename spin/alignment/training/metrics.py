"""What is logged about pairs: sums kept on the device, averaged over all pairs of all processes when they are logged."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spin.alignment.methods.losses import Loss, LossInputs, LossOutputs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# How far the policy is from the reference: only where there is one.
_DRIFT = ("drift/chosen", "drift/chosen_per_token")


@dataclass(frozen=True)
class PairAverages:
    """Averages over pairs under their standard names, and how many pairs and completion tokens they come from."""

    values: dict[str, float]
    pairs: int
    tokens: int


class PairMetrics:
    """Collects groups of pairs until they are averaged."""

    def __init__(self, loss: Loss) -> None:
        """``loss`` says which responses its pairs have, and whether there is a reference."""
        logps = (f"logps/{name}" for name in loss.responses)
        self._names = (*_NAMES, *logps, *(_DRIFT if loss.needs_reference else ()), "pairs", "tokens")
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, inputs: LossInputs, outputs: LossOutputs, losses: Tensor) -> None:
        """Add b pairs: their streams of shape ``(2b, R)`` and their losses of shape ``(b,)``."""
        mask = inputs.completion_mask
        logps = inputs.split(inputs.policy_logps.detach().double().sum(dim=-1))
        margins = outputs.chosen_rewards - outputs.rejected_rewards
        values = {
            "loss": losses.detach(),
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "rewards/accuracies": (margins > 0).double(),
            "rewards/margins": margins,
            **{f"logps/{name}": values for name, values in zip(inputs.responses, logps, strict=True)},
            **self._drift(inputs, logps[0]),
            "pairs": torch.ones_like(margins),
            "tokens": mask.sum().double(),
        }
        for name in self._names:
            self._sums[name].append(values[name].double().sum())

    @staticmethod
    def _drift(inputs: LossInputs, chosen: Tensor) -> dict[str, Tensor]:
        if inputs.reference_logps is None:
            return {}
        start, *_ = inputs.split(inputs.reference_logps.double().sum(dim=-1))
        chosen_mask, *_ = inputs.split(inputs.completion_mask)
        return dict(zip(_DRIFT, (chosen - start, (chosen - start) / chosen_mask.sum(dim=-1)), strict=True))

    def take(self, accelerator: Accelerator) -> PairAverages | None:
        """Return the averages over all processes and start anew; None when nothing was added in any of them.

        Every process must call it, one that added nothing too: the others wait for it in the reduction.
        """
        if self._sums:
            # float64 sums would not cross every backend (MPS); float32 is enough for a mean of pairs.
            local = torch.stack([torch.stack(self._sums[name]).sum() for name in self._names]).float()
        else:
            local = torch.zeros(len(self._names), device=accelerator.device)
        self._sums.clear()
        totals = accelerator.reduce(local, reduction="sum").double()
        total = dict(zip(self._names, totals.tolist(), strict=True))
        pairs, tokens = total.pop("pairs"), total.pop("tokens")
        if not pairs:
            return None
        return PairAverages({name: value / pairs for name, value in total.items()}, int(pairs), int(tokens))
