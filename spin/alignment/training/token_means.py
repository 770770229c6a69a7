"""Metrics of SFT: sums over predicted tokens kept on the device, averaged over the tokens of all processes when logged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

# Names of TRL's SFTTrainer. The entropy is in nats.
NAMES = ("loss", "entropy", "mean_token_accuracy")


class TokenMeans:
    """Accumulates the sums of micro-batches until they are averaged."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, loss: Tensor, entropy: Tensor, correct: Tensor, tokens: int) -> None:
        """Add the sums over some tokens of the loss (nats), the entropy (nats) and the correct predictions."""
        values = (loss, entropy, correct, torch.as_tensor(tokens))
        self._sums.append(torch.stack([value.detach().double().to(loss.device) for value in values]))

    def counted(self) -> int:
        """Return the number of tokens that this process has added since they were averaged last."""
        return int(sum(float(sums[-1]) for sums in self._sums))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes under :data:`NAMES` and reset the sums; empty if no process added any token.

        Every process must call it.
        """
        local = torch.stack(self._sums).sum(dim=0) if self._sums else torch.zeros(len(NAMES) + 1, dtype=torch.float64)
        self._sums.clear()
        *sums, tokens = accelerator.reduce(local.to(accelerator.device), reduction="sum").tolist()
        return {name: value / tokens for name, value in zip(NAMES, sums, strict=True)} if tokens else {}
