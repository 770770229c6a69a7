"""What SFT minimises: a loss per token, from the log-prob of its (smoothed) target. A new one is a line in :data:`OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.methods.losses import LossInputs


@dataclass(frozen=True)
class Objective:
    """A loss per token.

    Attributes:
        token_losses: function of log-probs ``(B, R)`` in nats that returns the losses ``(B, R)``; 0 at padding, where they are 0.
        takes_smoothing: whether label smoothing makes sense with it.
    """

    token_losses: Callable[[Tensor], Tensor]
    takes_smoothing: bool = True


def nll(logps: Tensor) -> Tensor:
    """Return the negative log-probs."""
    return -logps


def dft(logps: Tensor) -> Tensor:
    """Return the negative log-probs, each weighted by the target's probability without a gradient (arXiv 2508.05629)."""
    return -logps * logps.detach().exp()


# By the value of ``loss_type``, as in TRL.
OBJECTIVES = {"nll": Objective(nll), "dft": Objective(dft, takes_smoothing=False)}


class RowSums:
    """Sums an objective over all tokens (nats), and notes which rows have a loss that is not finite."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._faults: list[Tensor] = []

    def __call__(self, inputs: LossInputs) -> Tensor:
        """Return the sum over B responses, a scalar with gradient, from log-probs ``(B, R)`` that are 0 at padding."""
        losses = self.objective.token_losses(inputs.policy_logps)  # (B, R)
        self._faults.append(~losses.detach().isfinite().all(dim=1))  # (B,)
        return losses.double().sum()

    def faults(self) -> Tensor:
        """Return which rows have a loss that is not finite: bool ``(B,)``, in their order."""
        import torch

        return torch.cat(self._faults)
