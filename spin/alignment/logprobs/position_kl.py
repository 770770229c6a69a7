"""KL(policy || reference) at each response position, for losses with ``alpha`` (TIS-DPO, arXiv 2410.04350).

It needs the full distribution of the reference, which is too large to store, so a frozen copy of the model is kept next to the
policy and processes the same rows. Gradients flow through the policy's distribution; logits of one group of pairs are in memory
at a time and are recomputed in the backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.head import LogitTransform, logps_of
from spin.alignment.models.sharded import sharding_name

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.logprobs.batch import PairGroup

# Nothing here draws random numbers, so saving the generator's state would only cost a synchronisation.
_WITHOUT_RECOMPUTED_STATE = {"use_reentrant": False, "preserve_rng_state": False}
_TILE_ELEMENTS = 2**22  # logits converted to float32 at a time


@dataclass(frozen=True)
class ReferenceStates:
    """The reference model's hidden states ``(N, d)`` at the predictors of a packed batch, and its head."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def check_can_keep_reference(arguments: Any) -> None:
    """Refuse ``alpha`` if no process has the full model.

    Raises:
        InputError: ZeRO-3 or FSDP is enabled.
    """
    if not arguments.alpha:
        return
    sharded = sharding_name(arguments)
    if sharded:
        raise InputError(
            f"alpha is {arguments.alpha}, which needs a full copy of the reference next to the policy, but {sharded} shards "
            "models: set alpha to 0, or use configs/multi_gpu.yaml or deepspeed_zero2.yaml"
        )


def frozen_copy(model: Any, device: torch.device) -> Any:
    """Return a copy of a model, without gradients, on a device; call before training starts."""
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)


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
        policy, opponent = (torch.log_softmax(item, dim=-1) for item in values)  # (rows, V) each
        found.append((policy.exp() * (policy - opponent)).sum(dim=-1))  # (rows,)
    return torch.cat(found)


def grouped_logps_and_kl(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    opponent: ReferenceStates,
    targets: Tensor,
    groups: Sequence[PairGroup],
    transform: LogitTransform,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each group, the log-probs of its targets and the KL at their positions, ``(n,)`` each."""

    def of_group(states: Tensor, theirs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            reference_logits = opponent.head(theirs)  # (n, V)
        logits = head(states)  # (n, V)
        return logps_of(logits, labels, transform), position_kl(logits, reference_logits, transform)

    found = []
    for group in groups:
        given = (hidden[group.rows], opponent.hidden[group.rows], targets[group.rows])
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
