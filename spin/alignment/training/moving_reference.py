"""A reference that is an earlier state of the policy: its weights are exchanged with the policy's for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import atomic_file
from spin.alignment.models.sharded import is_sharded, local_part, offloads_weights, reshard, sharding_name

REFERENCE_FILE = "reference.safetensors"
FIXED = -1  # a frequency: the reference is never updated


def check_can_exchange(arguments: Any, key: str) -> None:
    """Check that the weights, as they will be sharded, can be exchanged with those of the reference that a ``key`` asks for.

    Raises:
        InputError: they cannot; the message names the fix.
    """
    value = getattr(arguments, key)
    if sharding_name(arguments) == "FSDP1":
        raise InputError(
            f"{key} is {value}, but weights that FSDP version 1 shards cannot be exchanged for a reference: set fsdp_version: 2 "
            "as in configs/fsdp2.yaml, or use ZeRO-3"
        )
    if offloads_weights(arguments) == "nvme":
        without = 1 if key == "ref_update_freq" else 0
        raise InputError(
            f"{key} is {value}, but weights that ZeRO-3 keeps on NVMe cannot be exchanged for a reference: set {key} to "
            f"{without}, or offload_param_device to cpu or none"
        )


class MovingReference:
    """The trained weights as of the start of the last step whose number is a multiple of ``frequency``.

    With a frequency of 1 the reference is the policy that samples, and no copy is kept unless it is read after an update; with
    :data:`FIXED` it is the policy before the first step. Of sharded weights, each process keeps, swaps and saves its own part.
    """

    def __init__(self, frequency: int, read_after_updates: bool = False, is_ahead: bool = False) -> None:
        """``read_after_updates``: it takes the policy's place also after updates within a step. ``is_ahead``: a batch is sampled
        one step before it is trained on, so the policy that sampled it is an earlier one."""
        self.frequency = frequency
        self._outlives_step = frequency != 1 or is_ahead
        self.keeps_copy = self._outlives_step or read_after_updates  # the trained weights are kept a second time
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def is_kept(self) -> bool:
        """Whether there is a copy."""
        return bool(self._kept)

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
        """Write the reference of an unwrapped model to a checkpoint, if it outlives a step. Every process must call it.

        Of a sharded model, each process writes its part to a file of its own.
        """
        if self._outlives_step and self._kept and (is_main or is_sharded(model)):
            with atomic_file(checkpoint / file_of(model)) as file:
                save_file({name: value.contiguous().cpu() for name, value in self._kept.items()}, file.name)

    def load(self, checkpoint: Path, model: Any) -> None:
        """Read the reference from the checkpoint that a run resumes from, if it outlives a step.

        Raises:
            InputError: the checkpoint has none for this process.
        """
        if not self._outlives_step:
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
