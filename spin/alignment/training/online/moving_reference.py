"""The reference of online training: an earlier state of the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file
from spin.alignment.models.sharded import is_sharded, local_part, reshard

REFERENCE_FILE = "reference.safetensors"
FIXED = -1  # a frequency: the reference is never updated


class MovingReference:
    """The trained weights as of the start of the last step whose number is a multiple of ``frequency``.

    With a frequency of 1 the reference is the policy that samples, and with :data:`FIXED` the policy before the first step. Of
    sharded weights, each process keeps, swaps and saves its own part.
    """

    def __init__(self, frequency: int, is_ahead: bool = False) -> None:
        """``is_ahead``: a batch is sampled one step before it is trained on, so the policy that sampled it is an earlier one."""
        self.frequency = frequency
        # The trained weights are kept a second time, unless the reference is the policy before its update.
        self.keeps_copy = is_ahead or frequency != 1
        self._kept: dict[str, torch.Tensor] = {}

    def update(self, model: Any, step: int) -> None:
        """Copy the weights of an unwrapped model before a ``step`` at which an update is due."""
        is_due = step == 0 if self.frequency == FIXED else step % self.frequency == 0
        if not self.keeps_copy or not is_due:
            return
        for name, weight in _trained(model):
            if name in self._kept:
                self._kept[name].copy_(local_part(weight))
            else:
                self._kept[name] = local_part(weight).clone()

    @contextlib.contextmanager
    def in_place_of(self, model: Any) -> Iterator[None]:
        """Swap the reference's weights into an unwrapped model, and back on exit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: Any) -> None:
        if not self._kept:
            return
        sharded = is_sharded(model)
        for name, weight in _trained(model):
            part, kept = local_part(weight), self._kept[name]
            if sharded:  # wrappers gather from this very memory, so its content is exchanged
                own = part.clone()
                part.copy_(kept)
                kept.copy_(own)
            else:  # only pointers move; the Parameter object stays, so the optimiser and DDP are unaffected
                weight.data, self._kept[name] = kept, part

    def save(self, checkpoint: Path, model: Any, is_main: bool) -> None:
        """Write the reference of an unwrapped model to a checkpoint, if a copy is kept. Every process must call it.

        Of a sharded model, each process writes its part to a file of its own.
        """
        if self._kept and (is_main or is_sharded(model)):
            with atomic_file(checkpoint / file_of(model)) as file:
                save_file({name: value.contiguous().cpu() for name, value in self._kept.items()}, file.name)

    def load(self, checkpoint: Path, model: Any) -> None:
        """Read the reference from the checkpoint that a run resumes from, if a copy is kept.

        Raises:
            InputError: the checkpoint has none for this process.
        """
        if not self.keeps_copy:
            return
        path = checkpoint / file_of(model)
        if not path.exists():
            same = ", with the same number of processes" if is_sharded(model) else ""
            raise InputError(
                f"{path} is missing, so the run cannot resume exactly: restore it{same}, or remove the checkpoint {checkpoint}"
            )
        kept = load_file(path)
        self._kept = {name: kept[name].to(local_part(weight).device) for name, weight in _trained(model)}


def file_of(model: Any) -> str:
    """Return the name of the file with this process's part of the reference: one for all unless the model is sharded."""
    if not is_sharded(model):
        return REFERENCE_FILE
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return f"reference-{rank + 1:05d}-of-{count:05d}.safetensors"


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    reshard(model)
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
