"""The reference log-probs of a training run: loaded from disk, or computed before the first step if they are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.pair_forward import PairForward, weight_dtype
from spin.alignment.logprobs.reference import compute_reference, log_progress
from spin.alignment.logprobs.reference_store import (
    ReferenceKey,
    ReferenceLogps,
    discard_damaged,
    is_whole,
    store_path,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach_reference(
    forward: PairForward,
    splits: Mapping[str, PairDataset | None],
    weights_hash: str,
    folder: Path,
    accelerator: Accelerator,
    checkpoints: str | None = None,
) -> None:
    """Attach the reference log-probs to every split, computing those missing from ``folder``.

    The model of ``forward`` is the reference, already prepared for the devices: it was loaded from the weights with that hash and
    no step has been taken, unless the run resumed from a checkpoint in the folder ``checkpoints``. Every process must call it.

    Raises:
        InputError: the store of a resumed run is missing; the weights in memory are no longer the reference's.
    """
    for split, dataset in splits.items():
        if dataset is None:
            continue
        key = ReferenceKey(weights_hash, dataset.tokens_hash, precision(forward, accelerator))
        path = store_path(folder, split, key)
        look = discard_damaged if checkpoints is None else is_whole
        found = [accelerator.is_main_process and look(path)]
        if not broadcast_object_list(found)[0]:
            if checkpoints is not None:
                raise InputError(
                    f"{path} is missing or damaged, and a resumed run cannot compute it: restore it; or start the same "
                    f"configuration with another output_dir and with reference_dir: {folder}, stop it after its first step, and "
                    f"run this command again; or remove the checkpoints in {checkpoints} and start over"
                )
            progress = log_progress(f"reference log-probs, {split} split")
            compute_reference(forward, dataset, path, key, accelerator, progress)
        dataset.reference = ReferenceLogps(path, key, dataset.rows)


def precision(forward: PairForward, accelerator: Accelerator) -> str:
    """Return the properties of a forward pass that affect the log-probs of given weights and tokens."""
    attention = forward.own_attention + (f", packed {forward.kernel}" if forward.kernel else "")
    return f"{weight_dtype(forward.model)}, autocast {accelerator.mixed_precision}, attention {attention}"
