"""The reference of online training: an earlier state of the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spin.alignment.core.errors import InputError

REFERENCE_FILE = "reference.safetensors"
FIXED = -1  # a frequency: the reference is never updated


class MovingReference:
    """The trained weights as of the start of the last step whose number is a multiple of ``frequency``.

    With a frequency of 1 the reference is the policy before its update, and no copy is kept; with :data:`FIXED` it is the policy
    before the first step.
    """

    def __init__(self, frequency: int) -> None:
        self.frequency = frequency
        self._kept: dict[str, torch.Tensor] = {}

    def update(self, model: Any, step: int) -> None:
        """Copy the weights of an unwrapped model before a ``step`` at which an update is due."""
        is_due = step == 0 if self.frequency == FIXED else step % self.frequency == 0
        if self.frequency != 1 and is_due:
            self._kept = {name: weight.detach().clone() for name, weight in _trained(model)}

    @contextlib.contextmanager
    def in_place_of(self, model: Any) -> Iterator[None]:
        """Swap the reference's weights into an unwrapped model, and back on exit. Only pointers move."""
        pairs = [(weight, self._kept[name]) for name, weight in _trained(model)] if self._kept else []
        own = [weight.data for weight, _ in pairs]
        for weight, kept in pairs:
            weight.data = kept  # the Parameter object stays, so the optimiser and wrappers are unaffected
        try:
            yield
        finally:
            for (weight, _), data in zip(pairs, own, strict=True):
                weight.data = data

    def save(self, checkpoint: Path) -> None:
        """Write the reference to a checkpoint, if a copy is kept."""
        if self._kept:
            kept = {name: value.contiguous().cpu() for name, value in self._kept.items()}
            save_file(kept, checkpoint / REFERENCE_FILE)

    def load(self, checkpoint: Path, device: torch.device) -> None:
        """Read the reference from the checkpoint that a run resumes from, if a copy is kept.

        Raises:
            InputError: the checkpoint has no reference.
        """
        if self.frequency == 1:
            return
        path = checkpoint / REFERENCE_FILE
        if not path.exists():
            raise InputError(
                f"{path} is missing, so the run cannot resume exactly: restore it, or remove the checkpoint {checkpoint}"
            )
        self._kept = {name: value.to(device) for name, value in load_file(path).items()}


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
