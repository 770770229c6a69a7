"""KL(policy || reference) at each response position, for losses with ``alpha`` (TIS-DPO, arXiv 2410.04350).

It needs the full distribution of the reference, which is too large to store, so the reference processes each micro-batch right
before the policy. Its weights may take the policy's place for that, also in a sharded module: of packed rows, its hidden states
and a copy of its head are all that the loss needs. Logits of one group of pairs are in memory at a time, and are computed again
in the backward pass. Gradients flow through the policy's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from spin.alignment.logprobs.head import LogitTransform, logps_of

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.logprobs.batch import PairGroup

# Nothing here draws random numbers, so saving the generator's state would only cost a synchronisation.
_WITHOUT_RECOMPUTED_STATE = {"use_reentrant": False, "preserve_rng_state": False}
_TILE_ELEMENTS = 2**22  # logits converted to float32 at a time


@dataclass(frozen=True)
class ReferenceStates:
    """The reference model's hidden states ``(N, d)`` at the predictors of a packed batch, and its head: the weight ``(V, d)`` and
    the bias ``(V,)`` or None. Without a weight, its head is the policy's own, which is not trained.
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def logits(self, rows: slice, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits ``(n, V)`` of some rows; ``head`` is the policy's."""
        states = self.hidden[rows]
        return head(states) if self.weight is None else torch.nn.functional.linear(states, self.weight, self.bias)


def position_kl(logits: Tensor, reference_logits: Tensor, transform: LogitTransform | None = None) -> Tensor:
    """Return ``sum_v pi(v) (log pi(v) - log pi_ref(v))`` in nats, ``(n,)``, for logits ``(n, V)``.

    Computed in float32 (float64 for float64 input), a few rows at a time.
    """
    rows = max(1, _TILE_ELEMENTS // logits.shape[-1])
    found = []
    for ours, theirs in zip(logits.split(rows), reference_logits.split(rows), strict=True):
        wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
        values = [item.to(wide) for item in (ours, theirs)]
        if transform is not None:
            values = [transform.apply(item) for item in values]
        policy, reference = (torch.log_softmax(item, dim=-1) for item in values)  # (rows, V) each
        found.append((policy.exp() * (policy - reference)).sum(dim=-1))  # (rows,)
    return torch.cat(found)


def grouped_logps_and_kl(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    reference: ReferenceStates,
    targets: Tensor,
    groups: Sequence[PairGroup],
    transform: LogitTransform,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each group, the log-probs of its targets and the KL at their positions, ``(n,)`` each."""

    def of_group(states: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            reference_logits = reference.logits(rows, head)  # (n, V)
        logits = head(states)  # (n, V)
        return logps_of(logits, labels, transform), position_kl(logits, reference_logits, transform)

    found = []
    for group in groups:
        given = (hidden[group.rows], targets[group.rows], group.rows)
        if torch.is_grad_enabled():
            found.append(checkpoint(of_group, *given, **_WITHOUT_RECOMPUTED_STATE))
        else:
            found.append(of_group(*given))
    return found


def padded_kl(logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the KL at each response position from logits ``(2B, R, V)``, of shape ``(2B, R)``; 0 where the mask is 0."""
    # One row (R, V) at a time: float32 copies of all logits would double the memory of the step.
    found = []
    for ours, theirs in zip(logits, reference_logits, strict=True):
        if logits.requires_grad:
            found.append(checkpoint(position_kl, ours, theirs, **_WITHOUT_RECOMPUTED_STATE))
        else:
            found.append(position_kl(ours, theirs))
    return torch.stack(found).masked_fill(mask == 0, 0.0)
