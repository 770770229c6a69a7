"""The objective of preference training: the method's loss, the NLL term, and the metrics of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LossInputs, LossOutputs
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.first_loss import FirstLoss
from spin.alignment.training.importance import Importance
from spin.alignment.training.metrics import PairMetrics


class PairObjective:
    """Computes the contribution of some pairs to a step's loss, and records metrics and the first loss."""

    def __init__(self, args: SPINConfig, first_loss: FirstLoss) -> None:
        self.args, self.first_loss = args, first_loss
        self.metrics = {mode: PairMetrics(args.loss, args.sampled_sides) for mode in ("train", "eval")}
        # Set by online training, whose pairs have the log-probs of their sampler.
        self.importance: Importance | None = None
        # Set by online training whose reference is the policy before its update: both have the log-probs of the same pass.
        self.reference_is_policy = False
        self._faults: list[torch.Tensor] = []

    def __call__(
        self, inputs: LossInputs, share: float | torch.Tensor, training: bool, counted: bool, step: int
    ) -> torch.Tensor:
        """Return the sum of the losses of B pairs times ``share``, the weight of a pair in the mean: a scalar with gradient.

        Pairs that are not ``counted`` contribute 0, with a gradient of 0. ``step`` is the number of optimiser steps completed.

        Raises:
            InputError: the loss needs reference log-probs, which the pairs do not have.
        """
        if self.reference_is_policy and self.args.loss.needs_reference:
            inputs = replace(inputs, reference_logps=inputs.policy_logps.detach())
        if inputs.reference_logps is None and self.args.loss.needs_reference:
            raise InputError(
                "these pairs have no reference log-probs, which train() computes for train_dataset and eval_dataset before its "
                "first step: call train() before evaluate(), and do not pass another data set to evaluate()"
            )
        outputs = self.args.loss(inputs, **self.args.loss_arguments)
        losses = preference_losses = per_pair(outputs)  # (B,)
        if self.importance is not None:
            losses = per_pair(self.importance.correct(inputs, outputs))
        if self.args.nll_weight:
            losses = losses + self.args.nll_weight * chosen_nll(inputs)
        # A log-prob of -inf can give a finite loss (hinge), so both are looked at.
        logps = torch.stack(inputs.split(inputs.policy_logps.detach()))  # (k, B, T)
        self._faults.append(~(torch.isfinite(losses.detach()) & torch.isfinite(logps).all(dim=2).all(dim=0)))  # (B,)
        if not counted:  # still part of the graph: under ZeRO-3 and FSDP every process must run a backward pass
            return losses.sum() * 0.0
        if training and self.first_loss.value is None:
            self.first_loss.add(inputs, preference_losses, share, step)
        self.metrics["train" if training else "eval"].add(inputs, outputs, losses)
        if training and self.importance is not None:
            self.importance.add(inputs, len(outputs.losses))
        return losses.sum() * share

    def take_faults(self) -> torch.Tensor:
        """Return which pairs since the last call have a loss or a log-prob that is not finite: bool, in their order."""
        faults, self._faults = self._faults, []
        return torch.cat(faults) if faults else torch.zeros(0, dtype=torch.bool)

    def averages(self, accelerator: Any, mode: str) -> tuple[dict[str, float], int]:
        """Return the averages over all pairs since the last call, under their logged names, and the number of tokens.

        ``mode`` is ``train`` or ``eval``. Every process must call it.
        """
        found = self.metrics[mode].take(accelerator)
        sampled = self.importance.take(accelerator) if mode == "train" and self.importance is not None else {}
        if found is None:
            return {}, 0
        if mode == "eval":
            return {f"eval_{name}": value for name, value in found.values.items()}, found.tokens
        # The Trainer logs the training loss itself.
        return {name: value for name, value in found.values.items() if name != "loss"} | sampled, found.tokens


def per_pair(outputs: LossOutputs) -> torch.Tensor:
    """Return one loss per pair, ``(B,)``; a loss with one value per response, ``(2B,)``, is averaged over the pair."""
    pairs = len(outputs.chosen_rewards)
    return outputs.losses if len(outputs.losses) == pairs else outputs.losses.view(-1, pairs).mean(dim=0)


def chosen_nll(inputs: LossInputs) -> torch.Tensor:
    """Return the negative log-likelihood of each chosen response in nats per token, of shape ``(B,)``."""
    logps, *_ = inputs.split(inputs.policy_logps)  # (B, T)
    mask, *_ = inputs.split(inputs.completion_mask)  # (B, T)
    return -(logps * mask).sum(dim=-1) / mask.sum(dim=-1)
