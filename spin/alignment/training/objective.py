"""The objective of preference training: the method's loss, the NLL term, and what is recorded of them."""

from __future__ import annotations

from typing import Any

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.methods.losses import LossInputs, LossOutputs
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.first_loss import FirstLoss
from spin.alignment.training.metrics import PairMetrics


class PairObjective:
    """Turns the token streams of some pairs into their part of a step's loss; keeps metrics and the first loss on the way."""

    def __init__(self, args: SPINConfig, first_loss: FirstLoss) -> None:
        self.args, self.first_loss = args, first_loss
        self.metrics = {"train": PairMetrics(args.loss), "eval": PairMetrics(args.loss)}

    def __call__(
        self, inputs: LossInputs, share: float | torch.Tensor, training: bool, counted: bool, step: int
    ) -> torch.Tensor:
        """Return the sum over B pairs of loss times ``share``, the weight of a pair in the mean; a scalar with gradient.

        Pairs that are not ``counted`` give 0, with a gradient of 0. ``step`` is the number of optimiser steps done.

        Raises:
            InputError: the loss compares with a reference, and the pairs have no log-probs of it.
        """
        if inputs.reference_logps is None and self.args.loss.needs_reference:
            raise InputError(
                "these pairs have no reference log-probs, which train() computes for train_dataset and eval_dataset before its "
                "first step: call train() before evaluate(), and pass evaluate() no other data set"
            )
        outputs = self.args.loss(inputs, **self.args.loss_arguments)
        losses = preference_losses = per_pair(outputs)
        if self.args.nll_weight:
            losses = losses + self.args.nll_weight * chosen_nll(inputs)
        if not counted:
            return losses.sum() * 0.0
        if training and self.first_loss.value is None:
            self.first_loss.add(inputs, preference_losses, share, step)
        self.metrics["train" if training else "eval"].add(inputs, outputs, losses)
        return losses.sum() * share

    def averages(self, accelerator: Any, mode: str) -> tuple[dict[str, float], int]:
        """Return the averages over all pairs since the last call under the names they are logged by, and their tokens.

        ``mode`` is train or eval. Every process must call it.
        """
        found = self.metrics[mode].take(accelerator)
        if found is None:
            return {}, 0
        if mode == "eval":
            return {f"eval_{name}": value for name, value in found.values.items()}, found.tokens
        # The Trainer logs the loss of training itself.
        return {name: value for name, value in found.values.items() if name != "loss"}, found.tokens


def per_pair(outputs: LossOutputs) -> torch.Tensor:
    """Return the losses ``(B,)`` of pairs; where a loss has one for each response (``(2B,)``), the mean of a pair's two."""
    pairs = len(outputs.chosen_rewards)
    return outputs.losses if len(outputs.losses) == pairs else outputs.losses.view(-1, pairs).mean(dim=0)


def chosen_nll(inputs: LossInputs) -> torch.Tensor:
    """Return the negative log-likelihood of each chosen response in nats per token, of shape ``(B,)``."""
    logps, *_ = inputs.split(inputs.policy_logps)
    mask, *_ = inputs.split(inputs.completion_mask)
    return -(logps * mask).sum(dim=-1) / mask.sum(dim=-1)
