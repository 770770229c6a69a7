"""Preference pairs as the trainer receives them, and the tensors of a packed micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PackedLayout
from spin.alignment.methods.losses import LossInputs

if TYPE_CHECKING:
    from datasets import Dataset

    from spin.alignment.logprobs.reference_store import ReferenceLogps

Feature = Mapping[str, Any]

# Logits of one group of pairs, in elements: large enough for efficient matmuls, small compared to the activations.
GROUP_ELEMENTS = 2**26


class PairDataset(torch.utils.data.Dataset):
    """Encoded pairs, each with the reference log-probs once they are attached.

    ``rows`` has the columns prompt_ids, chosen_ids, rejected_ids (``{response}_ids`` of every response that the loss reads)
    and, when tokens are weighted, chosen_weights and rejected_weights; any other column chosen_X, rejected_X is a label X.
    """

    def __init__(self, rows: Dataset, tokens_hash: str = "") -> None:
        """``tokens_hash`` is the hash of all ids of the rows, if it is known."""
        self.rows = rows
        self._tokens_hash = tokens_hash
        self.reference: ReferenceLogps | None = None

    @property
    def tokens_hash(self) -> str:
        """The hash of all ids of the rows (:func:`spin.alignment.logprobs.reference_store.hash_tokens`)."""
        if not self._tokens_hash:
            from spin.alignment.logprobs.reference_store import hash_tokens

            self._tokens_hash = hash_tokens(self.rows)
        return self._tokens_hash

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        feature = dict(self.rows[index])
        if self.reference is not None:
            feature |= {f"{name}_reference": logps for name, logps in self.reference[index].items()}
        return feature


class PairList:
    """The pairs of one process in an optimiser batch, as the data loader returns them: not yet tensors.

    ``is_stand_in``: the process has no pairs of its own; these only keep it in step with the other processes.
    """

    def __init__(self, features: Sequence[Feature], is_stand_in: bool = False) -> None:
        self.features = list(features)
        self.is_stand_in = is_stand_in

    def __len__(self) -> int:
        """The number of pairs that count."""
        return 0 if self.is_stand_in else len(self.features)


@dataclass(frozen=True)
class PairGroup:
    """b pairs whose response tokens are contiguous in the batch: all chosen responses, then all rejected ones.

    ``rows`` is their slice of the N response tokens; ``completion_mask`` has shape ``(2b, R)``, as have ``reference_logps`` and
    ``sampler_logps`` (nats) and ``weights`` if the data has them; each of the ``labels`` has shape ``(2b,)``. With k
    ``responses`` per row, all of them have length ``kb``.
    """

    rows: slice
    completion_mask: torch.Tensor
    reference_logps: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    labels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    responses: tuple[str, ...] = SIDES
    sampler_logps: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        return len(self.completion_mask) // len(self.responses)

    def loss_inputs(self, logps: torch.Tensor, kl: torch.Tensor | None = None) -> LossInputs:
        """Return the inputs of a loss from flat log-probs, and KL if given, of shape ``(n,)`` in the order of ``rows``."""
        policy, position_kl = (
            None
            if flat is None
            else flat.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, flat)
            for flat in (logps, kl)
        )
        assert policy is not None
        mask, reference = self.completion_mask, self.reference_logps
        streams = (self.weights, position_kl, self.labels, self.responses, self.sampler_logps)
        return LossInputs(policy, reference, mask, *streams)

    def unpadded(self, logps: torch.Tensor) -> list[torch.Tensor]:
        """Return the log-probs of each response, without padding: b chosen ones, then b rejected ones."""
        return list(logps.split(self.completion_mask.sum(dim=1).tolist()))

    def to(self, device: torch.device) -> PairGroup:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in ("completion_mask", "reference_logps", "weights", "sampler_logps")
            if (value := getattr(self, name)) is not None
        }
        labels = {name: value.to(device, non_blocking=True) for name, value in self.labels.items()}
        return replace(self, **moved, labels=labels)


@dataclass(frozen=True)
class PackedBatch:
    """Pairs in one row of T tokens without padding.

    ``input_ids`` and ``position_ids`` have shape ``(1, T)``; ``predictors`` (N,) gives the position in the row whose hidden
    state predicts each response token, ``targets`` (N,) the token. ``groups`` divide the N tokens into groups of whole pairs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    predictors: torch.Tensor
    targets: torch.Tensor
    groups: tuple[PairGroup, ...]

    def to(self, device: torch.device) -> PackedBatch:
        names = ("input_ids", "position_ids", "predictors", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        # Rebuilt rather than moved: its index tensors are created lazily on the device.
        layout = PackedLayout(self.layout.trees, device, self.layout.kernel)
        return replace(self, **moved, layout=layout, groups=tuple(group.to(device) for group in self.groups))
