"""Metrics of preference pairs: sums kept on the device, averaged over the pairs of all processes when logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spin.alignment.methods.losses import Loss, LossInputs, LossOutputs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


_NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# How far the policy has moved from the reference; only logged for losses that use one. The rejected response is the opponent's
# own in self-play: minus its drift is an estimate of the KL divergence of the opponent from the policy, in nats per response.
_DRIFT = ("drift/chosen", "drift/chosen_per_token", "drift/rejected")
# KL(policy || reference) in nats per token; only logged if responses were sampled by the policy (online training).
_KL, _KL_TOKENS = "kl", "kl tokens"
# Logged with their standard error over the pairs (``_se``): the report states them as results.
_WITH_ERROR = ("rewards/accuracies", "rewards/margins", "drift/chosen", "drift/rejected")
_SQUARES = " squared"


def metric_names(loss: Loss) -> list[str]:
    """Return the names of the averages over pairs that are logged for a loss."""
    logps = (f"logps/{name}" for name in loss.responses)
    return [*_NAMES, *logps, *(_DRIFT if loss.needs_reference else ())]


@dataclass(frozen=True)
class PairAverages:
    """Averages over pairs under their standard names, and the number of pairs and completion tokens averaged."""

    values: dict[str, float]
    pairs: int
    tokens: int


class PairMetrics:
    """Accumulates the sums of micro-batches until they are averaged."""

    def __init__(self, loss: Loss, sampled: Sequence[str] = ()) -> None:
        """``loss`` declares which responses a pair has, and whether there is a reference; ``sampled`` are those of them that the
        policy itself has sampled."""
        means = metric_names(loss)
        self._sampled = [loss.responses.index(name) for name in sampled] if loss.needs_reference else []
        self._spread = tuple(name for name in _WITH_ERROR if name in means)
        kl = (_KL, _KL_TOKENS) if self._sampled else ()
        self._names = (*means, "pairs", "tokens", *kl, *(f"{name}{_SQUARES}" for name in self._spread))
        self._sums: dict[str, list[Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, inputs: LossInputs, outputs: LossOutputs, losses: Tensor) -> None:
        """Add B pairs: their token streams of shape ``(2B, T)`` and their losses of shape ``(B,)``."""
        mask = inputs.completion_mask  # (2B, T)
        # Padding positions have log-prob 0, so the sum over T needs no mask. One tensor (B,) per response.
        logps = inputs.split(inputs.policy_logps.detach().double().sum(dim=-1))
        margins = outputs.chosen_rewards - outputs.rejected_rewards
        values = {
            "loss": losses.detach(),
            "rewards/chosen": outputs.chosen_rewards,
            "rewards/rejected": outputs.rejected_rewards,
            "rewards/accuracies": (margins > 0).double(),
            "rewards/margins": margins,
            **{f"logps/{name}": values for name, values in zip(inputs.responses, logps, strict=True)},
            **self._drift(inputs, logps[0], logps[1]),
            **self._kl(inputs),
            "pairs": torch.ones_like(margins),
            "tokens": mask.sum().double(),
        }
        values |= {f"{name}{_SQUARES}": values[name].double() ** 2 for name in self._spread}
        for name in self._names:
            self._sums[name].append(values[name].double().sum())

    def _kl(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the sum over the tokens of sampled responses of ``ratio - 1 - log ratio``, with ratio = reference / policy, and
        the number of these tokens. For responses of the present policy, the mean estimates KL(policy || reference) without bias,
        and is never negative (J. Schulman, "Approximating KL divergence", 2020)."""
        if not self._sampled:
            return {}
        assert inputs.reference_logps is not None
        logratios = inputs.reference_logps.double() - inputs.policy_logps.detach().double()  # (kB, T)
        terms, masks = inputs.split(torch.expm1(logratios) - logratios), inputs.split(inputs.completion_mask)
        kept = [masks[place].double() for place in self._sampled]
        summed = sum((terms[place] * mask).sum() for place, mask in zip(self._sampled, kept, strict=True))
        return {_KL: torch.as_tensor(summed), _KL_TOKENS: torch.stack([mask.sum() for mask in kept]).sum()}

    def counted(self) -> tuple[int, int]:
        """Return the number of pairs and completion tokens that this process has added since they were averaged last."""
        pairs, tokens = (sum(int(value) for value in self._sums.get(name, ())) for name in ("pairs", "tokens"))
        return pairs, tokens

    @staticmethod
    def _drift(inputs: LossInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        if inputs.reference_logps is None:
            return {}
        starts = inputs.split(inputs.reference_logps.double().sum(dim=-1))  # (B,) each
        chosen_mask, *_ = inputs.split(inputs.completion_mask)  # (B, T)
        moved = chosen - starts[0]
        return dict(zip(_DRIFT, (moved, moved / chosen_mask.sum(dim=-1), rejected - starts[1]), strict=True))

    def take(self, accelerator: Accelerator) -> PairAverages | None:
        """Return the averages over all processes and reset the sums; None when no process added anything.

        Every process must call it, even one that added nothing: the reduction waits for all of them.
        """
        if self._sums:
            local = torch.stack([torch.stack(self._sums[name]).sum() for name in self._names])
        else:
            local = torch.zeros(len(self._names), device=accelerator.device)
        # MPS has no float64; elsewhere it keeps the variances exact.
        local = local.float() if local.device.type == "mps" else local.double()
        self._sums.clear()
        totals = accelerator.reduce(local, reduction="sum").double()
        total = dict(zip(self._names, totals.tolist(), strict=True))
        pairs, tokens = total.pop("pairs"), total.pop("tokens")
        squares = {name: total.pop(f"{name}{_SQUARES}") for name in self._spread}
        divergence, tokens_of_kl = total.pop(_KL, 0.0), total.pop(_KL_TOKENS, 0.0)
        if not pairs:
            return None
        values = {name: value / pairs for name, value in total.items()}
        if self._sampled:
            values[_KL] = divergence / max(1.0, tokens_of_kl)
        if pairs > 1:
            for name, square in squares.items():
                variance = max(0.0, square - pairs * values[name] ** 2) / (pairs - 1)
                values[f"{name}_se"] = math.sqrt(variance / pairs)
        return PairAverages(values, int(pairs), int(tokens))
