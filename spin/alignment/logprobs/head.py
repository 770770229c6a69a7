"""The output head on response positions only, with logits of one group of pairs in memory at a time.

Since the reference log-probs are stored, the loss of a pair is known as soon as its logits are. Its gradient is computed at
once, so a step costs three head matmuls (logits, gradient of the hidden states, gradient of the weight) and the logits of a
group are freed before those of the next group are computed.

Shapes: N response tokens, n of them in a group, d hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.logprobs.batch import PairGroup
    from spin.alignment.methods.losses import LossInputs

# A function of the loss inputs of one group that returns the sum of its losses; it may store values for the metrics.
Objective = Callable[["LossInputs"], "Tensor"]


class LogitReader(Protocol):
    """What takes the place of :func:`logps_and_slopes` and :func:`logps_of` in the head, with the same arguments."""

    def logps_and_slopes(self, logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor: ...

    def logps_of(self, logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor: ...


# float32 workspace of the softmax, in elements: small enough for a CPU's cache, large enough to fill a GPU.
_TILE_ELEMENTS = {"cpu": 2**19, "other": 2**26}


@dataclass(frozen=True)
class LogitTransform:
    """A model's transform of its logits, ``softcap * tanh(scale * logits / softcap)``, as in Gemma, Cohere and Granite."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read the transform from a model's text configuration."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Return the derivative of the transform at the logits that it mapped to ``transformed``."""
        return self.scale if self.softcap is None else self.scale * (1 - (transformed / self.softcap) ** 2)

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None


class FusedHeadLoss(torch.autograd.Function):
    """Sum of the objective over all groups, with the gradients of hidden states and head computed in the forward pass.

    ``hidden`` (N, d), ``weight`` (V, d), ``bias`` (V,) or None, ``targets`` (N,). Matmuls run in the dtype of ``hidden``;
    softmax, log-probs and the sum of the head's gradient over groups in float32 (float64 for float64 input). A ``reader`` takes
    the place of :func:`logps_and_slopes`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        groups: Sequence[PairGroup],
        objective: Objective,
        transform: LogitTransform,
        reader: LogitReader | None = None,
    ) -> Tensor:
        read = logps_and_slopes if reader is None else reader.logps_and_slopes
        compute_weight = weight.to(hidden.dtype)  # (V, d)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for group in groups:
            states, labels = hidden[group.rows], targets[group.rows]  # (n, d), (n,)
            logits = torch.mm(states, compute_weight.t())  # (n, V)
            if bias is not None:
                logits += bias.to(logits.dtype)
            logps = read(logits, labels, transform)  # (n,); logits now contain -dlogp/dlogits
            loss, slopes = _differentiate(objective, group, logps)  # (), (n,)
            total += loss
            # Rows are scaled on the narrow (d) side of each product, never across the vocabulary.
            factors = -slopes[:, None].to(hidden.dtype)  # (n, 1)
            if grad_hidden is not None:
                grad_hidden[group.rows] = torch.mm(logits, compute_weight).mul_(factors)
            if grad_weight is not None:
                _accumulate(grad_weight, logits, states * factors)
            if grad_bias is not None:
                grad_bias += torch.mv(logits.t(), factors[:, 0]).to(wide)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled = [
            None if found is None else found.mul_(grad.to(found.dtype)).to(dtype)
            for found, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None  # scaled in place above, so a second backward pass must fail
        return (*scaled, None, None, None, None, None)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to a float32 total, without rounding the product to 16 bits if the device supports that.

    ``left`` is ``(n, V)``, ``right`` ``(n, d)``, ``total`` ``(V, d)``.
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        total += torch.mm(left.t(), right, out_dtype=total.dtype)
    else:
        total += torch.mm(left.t(), right)


def _differentiate(objective: Objective, group: PairGroup, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a group's loss and its derivative with respect to each response token's log-prob, ``(n,)``."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = objective(group.loss_inputs(leaf))
        (slopes,) = torch.autograd.grad(loss, leaf)
    return loss.detach().double(), slopes


def logps_and_slopes(logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return the log-probs ``(n,)`` of the targets and replace the logits ``(n, V)`` in place by ``softmax - onehot``
    (times the slope of the transform), minus the derivative of each log-prob.

    The entry of the target is ``expm1(logp)``: subtracting 1 in 16 bits would lose it where the model is confident.
    """
    found = []
    for tile, labels in tiles(logits, targets):
        values = transform.apply(tile.to(wide(tile.dtype)))  # (rows, V)
        logprobs = torch.log_softmax(values, dim=-1)  # (rows, V)
        logps = logprobs.gather(1, labels[:, None])  # (rows, 1)
        slopes = logprobs.exp_().scatter_(1, labels[:, None], torch.expm1(logps))
        if not transform.is_identity:
            slopes = slopes * transform.slope(values)
        tile.copy_(slopes)
        found.append(logps[:, 0])
    return torch.cat(found)


def logps_of(logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return the log-probs ``(n,)`` of the targets under logits ``(n, V)``, in nats, float32 (float64 for float64 input)."""
    found = [
        torch.log_softmax(transform.apply(tile.to(wide(tile.dtype))), dim=-1).gather(1, labels[:, None])[:, 0]
        for tile, labels in tiles(logits, targets)
    ]
    return torch.cat(found)


def tiles(logits: Tensor, targets: Tensor) -> zip[tuple[Tensor, Tensor]]:
    """Split logits and targets into tiles of whole rows that fit the workspace."""
    limit = _TILE_ELEMENTS.get(logits.device.type, _TILE_ELEMENTS["other"])
    rows = max(1, limit // logits.shape[1])
    return zip(logits.split(rows), targets.split(rows), strict=True)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the softmax of logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped_logps(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    groups: Sequence[PairGroup],
    transform: LogitTransform,
    reader: LogitReader | None = None,
) -> Tensor:
    """Return the log-probs ``(N,)`` of all targets; a group's logits are recomputed in the backward pass.

    For heads that are not a single weight matrix (with adapters, quantised) and for passes without gradients. A ``reader``
    takes the place of :func:`logps_of`.
    """
    read = logps_of if reader is None else reader.logps_of

    def group_logps(states: Tensor, labels: Tensor) -> Tensor:
        return read(head(states), labels, transform)

    found = []
    for group in groups:
        states, labels = hidden[group.rows], targets[group.rows]
        if torch.is_grad_enabled():
            found.append(checkpoint(group_logps, states, labels, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(group_logps(states, labels))
    return torch.cat(found)
