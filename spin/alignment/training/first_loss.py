"""The first optimiser step: a guard that the policy still is its reference model, and its loss, for the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spin.alignment.core.files import write_json_atomic
from spin.alignment.methods.losses import LossInputs

if TYPE_CHECKING:
    from accelerate import Accelerator

FIRST_LOSS_FILE = "first_loss.json"
# Largest mean |log pi - log pi_ref| (nats per token) that rounding explains when policy and reference are the same weights.
_SAME_MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class FirstLoss:
    """The mean preference loss (without NLL term) of the first optimiser step: ln 2 for the sigmoid loss.

    A run that is resumed does not see its first step again, so the value is written into ``output_dir`` at once.
    """

    def __init__(self, dtype: torch.dtype, output_dir: str | Path) -> None:
        """``dtype`` is the precision of the policy's matrix products."""
        self.value: float | None = None
        self._tolerance = _SAME_MODEL_TOLERANCE.get(dtype, 0.1)
        self._path = Path(output_dir) / FIRST_LOSS_FILE
        self._shares: list[torch.Tensor] = []

    def add(self, inputs: LossInputs, losses: torch.Tensor, share: float | torch.Tensor, step: int) -> None:
        """Add the losses ``(B,)`` of some pairs; ``share`` is the weight of one in the mean, ``step`` the steps done.

        Raises:
            RuntimeError: no step is done, but the policy's log-probs are not those of the reference.
        """
        self._shares.append(losses.detach().sum() * share)
        if step > 0 or inputs.reference_logps is None:
            return
        mask = inputs.completion_mask.bool()
        difference = (inputs.policy_logps.detach() - inputs.reference_logps).abs()[mask].mean().item()
        if not difference <= self._tolerance:
            raise RuntimeError(
                f"policy and opponent differ by {difference:.3g} nats per token before the first step: the stored log-probs "
                "are not those of this model"
            )

    def finish(self, accelerator: Accelerator, step: int) -> None:
        """Take the mean over all processes, and write it where no step was done before. Every process must call it."""
        share = torch.stack(self._shares).sum().float() if self._shares else torch.zeros(())
        self.value = float(accelerator.reduce(share.to(accelerator.device), reduction="mean"))
        if step == 0 and accelerator.is_main_process:
            write_json_atomic(self._path, self.value)
