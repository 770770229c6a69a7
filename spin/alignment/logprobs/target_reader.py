"""Reads from logits what SFT needs of each target: its smoothed log-prob, and the entropy and accuracy of the prediction.

Shapes: n tokens, V vocabulary size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spin.alignment.logprobs.head import LogitTransform, tiles, wide

if TYPE_CHECKING:
    from torch import Tensor


class TargetReader:
    """Reads the targets of one micro-batch. The log-prob of a smoothed target is that of its distribution q,

        sum_v q_v log p_v,    q = (1 - e) onehot + e / V,

    so minus its sum is the loss of transformers' ``LabelSmoother`` with factor e; without smoothing it is log p of the target.
    What the head computes in the forward pass is counted, its recomputation in a backward pass is not (see :meth:`take`).
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self._sums: list[Tensor] | None = []

    def logps_and_slopes(self, logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
        """Return the log-probs ``(n,)`` and replace the logits ``(n, V)`` in place by ``softmax - q`` (times the slope of the
        transform), minus the derivative of each log-prob.
        """
        found = []
        for tile, labels in tiles(logits, targets):
            values = transform.apply(tile.to(wide(tile.dtype)))  # (rows, V)
            logprobs = torch.log_softmax(values, dim=-1)  # (rows, V)
            picked = logprobs.gather(1, labels[:, None])  # (rows, 1)
            found.append(self._smoothed(logprobs, picked))
            slopes = logprobs.exp_()
            self._count(values, slopes, labels, picked)
            # 1 is not subtracted from a rounded probability: that would lose the entry where the model is confident.
            slopes.scatter_(1, labels[:, None], torch.expm1(picked) + self.smoothing)
            if self.smoothing:
                slopes -= self.smoothing / values.shape[1]
            if not transform.is_identity:
                slopes *= transform.slope(values)
            tile.copy_(slopes)
        return torch.cat(found)

    def logps_of(self, logits: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
        """Return the log-probs ``(n,)`` with their graph."""
        found = []
        for tile, labels in tiles(logits, targets):
            values = transform.apply(tile.to(wide(tile.dtype)))  # (rows, V)
            logprobs = torch.log_softmax(values, dim=-1)  # (rows, V)
            picked = logprobs.gather(1, labels[:, None])  # (rows, 1)
            found.append(self._smoothed(logprobs, picked))
            if self._sums is not None:
                with torch.no_grad():
                    self._count(values, logprobs.exp(), labels, picked)
        return torch.cat(found)

    def padded_logps(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probs ``(B * R,)`` of padded rows: logits ``(B, R, V)`` of the model's own head, already transformed,
        labels and mask ``(B, R)``; 0 where the mask is 0.
        """
        keep = mask.bool()
        found = self.logps_of(logits[keep], labels[keep], LogitTransform())
        return found.new_zeros(keep.shape).masked_scatter(keep, found).flatten()

    def _smoothed(self, logprobs: Tensor, picked: Tensor) -> Tensor:
        if not self.smoothing:
            return picked[:, 0]
        return (1 - self.smoothing) * picked[:, 0] + self.smoothing * logprobs.mean(dim=-1)

    def _count(self, values: Tensor, probabilities: Tensor, labels: Tensor, picked: Tensor) -> None:
        """Count the entropy (nats) and the correct predictions of one tile, all of shape ``(rows, V)`` or ``(rows, 1)``."""
        if self._sums is None:
            return
        logit = values.gather(1, labels[:, None])  # (rows, 1)
        # log p = value - log-partition, so the entropy needs no second tile of log-probs.
        entropy = (logit - picked)[:, 0] - (probabilities * values).sum(dim=-1)  # (rows,)
        correct = logit[:, 0] >= values.amax(dim=-1)  # (rows,)
        self._sums.append(torch.stack([entropy.double().sum(), correct.double().sum()]))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the sums over all targets of entropy (nats) and correct predictions, and stop counting."""
        assert self._sums is not None
        found = torch.stack(self._sums).sum(dim=0) if self._sums else torch.zeros(2, dtype=torch.float64)
        self._sums = None
        return found[0], found[1]
