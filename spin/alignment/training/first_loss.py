"""The first optimiser step: check that the policy still equals its reference, and record the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spin.alignment.core.content_hash import is_damaged, sealed_file
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.methods.losses import LossInputs

if TYPE_CHECKING:
    from accelerate import Accelerator

FIRST_LOSS_FILE = "first_loss.json"
# Largest mean |log pi - log pi_ref| (nats per token) that rounding can cause when policy and reference have the same weights.
_SAME_MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class FirstLoss:
    """The mean preference loss (without the NLL term) of the first optimiser step: ln 2 for the sigmoid loss.

    A resumed run does not repeat its first step, so the value is written to ``output_dir`` immediately.
    """

    def __init__(self, dtype: torch.dtype, output_dir: str | Path) -> None:
        """``dtype`` is the precision of the policy's matrix products, which sets the tolerance."""
        self.value: float | None = None
        self._tolerance = _SAME_MODEL_TOLERANCE.get(dtype, 0.1)
        self._path = Path(output_dir) / FIRST_LOSS_FILE
        self._shares: list[torch.Tensor] = []

    def add(self, inputs: LossInputs, losses: torch.Tensor, share: float | torch.Tensor, step: int) -> None:
        """Add the losses ``(B,)`` of B pairs; ``share`` is the weight of one pair in the mean, ``step`` the steps completed.

        Raises:
            RuntimeError: no step has been taken, but the policy's log-probs differ from those of the reference.
        """
        self._shares.append(losses.detach().sum() * share)
        if step > 0 or inputs.reference_logps is None:
            return
        mask = inputs.completion_mask.bool()  # (2B, T)
        difference = (inputs.policy_logps.detach() - inputs.reference_logps).abs()[mask].mean().item()
        if math.isfinite(difference) and difference > self._tolerance:  # NaN stops the step by itself, naming the row
            raise RuntimeError(
                f"policy and reference differ by {difference:.3g} nats per token before the first step: the stored log-probs "
                "are not those of this model"
            )

    def finish(self, accelerator: Accelerator, step: int) -> None:
        """Average over all processes, and write the result if no step was taken before. Every process must call it."""
        share = torch.stack(self._shares).sum().float() if self._shares else torch.zeros(())
        self.value = float(accelerator.reduce(share.to(accelerator.device), reduction="mean"))
        if step == 0 and accelerator.is_main_process:
            with sealed_file(self._path) as file:
                file.write(f"{json.dumps(self.value)}\n".encode())


def read_first_loss(output_dir: Path) -> float:
    """Return the recorded loss of the first step.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = output_dir / FIRST_LOSS_FILE
    if not path.is_file() or is_damaged(path):
        raise InputError(f"{path} is missing or damaged: restore it")
    return float(read_json(path))
