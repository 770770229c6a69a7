"""Inputs, outputs and declaration of a loss, and the sums that losses share. Pure tensor functions: no model, no I/O."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spin.alignment.core.sides import SIDES
from spin.alignment.methods.labels import Label, as_labels

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """Token streams of shape ``(2B, T)``: B chosen responses, then B rejected ones. Log-probabilities are in nats.

    ``weights`` are token weights (``None``: 1 for every completion token), ``position_kl`` is KL(policy || reference) at each
    position in nats, ``labels`` has a tensor of shape ``(2B,)`` for each label that the loss reads. A loss that reads more
    ``responses``, k in total, receives streams ``(kB, T)`` in their order; one that needs no reference receives no
    ``reference_logps``. ``sampler_logps`` are those of the model that sampled the responses, NaN for tokens that it did not
    sample; only online training has them.
    """

    policy_logps: Tensor
    reference_logps: Tensor | None
    completion_mask: Tensor
    weights: Tensor | None = None
    position_kl: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    responses: tuple[str, ...] = SIDES
    sampler_logps: Tensor | None = None

    def label(self, name: str) -> Tensor:
        """Return a label in float64, of shape ``(2B,)``.

        Raises:
            ValueError: the inputs do not have the label.
        """
        if name not in self.labels:
            raise ValueError(f"the loss reads the label {name}, which these inputs do not have")
        return self.labels[name].double()

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split ``(kB, ...)`` into one tensor ``(B, ...)`` per response: chosen, rejected, and any further ones."""
        return values.chunk(len(self.responses))


@dataclass(frozen=True)
class LossOutputs:
    """Results before averaging; the implicit rewards (beta times nats) have shape ``(B,)`` and are detached.

    ``losses`` has shape ``(B,)``, or ``(2B,)`` with one value per response; the loss of a pair is then the mean of its two.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class Loss:
    """A loss function and its declared properties. A plain function is a loss with the defaults below.

    Attributes:
        function: a pure function of :class:`LossInputs`; its keyword arguments, each with a default, are its settings.
        reads: labels of the responses that it reads (:class:`Label`, or just a name if any finite number is valid).
        responses: the responses of a row that it reads, in the order of its streams.
        needs_reference: whether it reads ``reference_logps``; they are not computed otherwise.
        compares: whether it depends on which response is preferred, so that the pairing must state a preference.
        least: lower bounds of its settings, by name.
    """

    function: Callable[..., LossOutputs]
    reads: tuple[Label | str, ...] = ()
    responses: tuple[str, ...] = SIDES
    needs_reference: bool = True
    compares: bool = True
    least: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, inputs: LossInputs, **settings: Any) -> LossOutputs:
        return self.function(inputs, **settings)

    @property
    def labels(self) -> tuple[Label, ...]:
        return as_labels(self.reads)

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """The keyword arguments of the function, by name."""
        return dict(list(inspect.signature(self.function).parameters.items())[1:])  # the first one takes LossInputs


def sequence_logratios(inputs: LossInputs, length_normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return the weighted log-ratios ``sum_t w_t (log pi(y_t) - log pi_ref(y_t))`` of chosen and rejected, each ``(B,)``.

    Differences are taken per token and summed in float64: subtracting two sequence sums near -2500 nats would lose precision
    in float32.
    ``length_normalize`` divides by the number of completion tokens.

    Raises:
        ValueError: the inputs have no reference log-probs.
    """
    if inputs.reference_logps is None:
        raise ValueError("the loss reads reference log-probs, which these inputs do not have: set needs_reference")
    ratios = inputs.policy_logps.double() - inputs.reference_logps.double()  # (2B, T)
    chosen, rejected, *_ = inputs.split(_weighted_sums(ratios, inputs, length_normalize))
    return chosen, rejected


def sequence_logps(inputs: LossInputs, length_normalize: bool = False) -> tuple[Tensor, ...]:
    """Return the weighted log-probs ``sum_t w_t log pi(y_t)`` (nats), one tensor ``(B,)`` per response in their order.

    ``length_normalize`` divides by the number of completion tokens.
    """
    return inputs.split(_weighted_sums(inputs.policy_logps.double(), inputs, length_normalize))


def kl_penalty(inputs: LossInputs, alpha: float, length_normalize: bool = False) -> Tensor | float:
    """Return ``alpha (sum_t w_t KL_t(chosen) - sum_t w_t KL_t(rejected))``, of shape ``(B,)``; 0 at ``alpha = 0``.

    This is the weighted sequence-KL term that TIS-DPO (arXiv 2410.04350) subtracts from the margin of log-ratios.

    Raises:
        ValueError: ``alpha`` is not 0 and the inputs have no ``position_kl``.
    """
    if not alpha:
        return 0.0
    if inputs.position_kl is None:
        raise ValueError(f"alpha is {alpha}, but these inputs have no position_kl: set alpha to 0")
    chosen, rejected, *_ = inputs.split(_weighted_sums(inputs.position_kl.double(), inputs, length_normalize))
    return alpha * (chosen - rejected)


def _weighted_sums(streams: Tensor, inputs: LossInputs, length_normalize: bool) -> Tensor:
    mask = inputs.completion_mask.double()
    weights = mask if inputs.weights is None else inputs.weights.double() * mask
    # Masked before multiplying: a NaN at a padding position times a weight of 0 would still be NaN.
    totals = (streams.masked_fill(mask == 0, 0.0) * weights).sum(dim=-1)  # (kB, T) -> (kB,)
    return totals / mask.sum(dim=-1) if length_normalize else totals


def outputs(losses: Tensor, chosen: Tensor, rejected: Tensor, beta: float) -> LossOutputs:
    """Return the losses together with the implicit rewards ``beta * logratio``."""
    return LossOutputs(losses, (beta * chosen).detach(), (beta * rejected).detach())
