"""PairRM as a torch module, under the names of its published weights. Imported only when a checkpoint is checked or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DebertaV2Model


@dataclass(frozen=True)
class Logits:
    """What a forward pass returns, as transformers' classifiers do: ``logits`` (B,)."""

    logits: torch.Tensor


class PairRMModule(nn.Module):
    """A DeBERTa encoder and a head that reads its last states at the marks."""

    def __init__(self, encoder: Any, tasks: int, mark_ids: tuple[int, int, int]) -> None:
        """Make a module with random weights.

        Args:
            encoder: the encoder's ``DebertaV2Config``.
            tasks: outputs of the head.
            mark_ids: ids of the source mark and the two candidate marks; each occurs once in every row.
        """
        super().__init__()
        self.config, self.mark_ids = encoder, mark_ids
        self.pretrained_model = DebertaV2Model(encoder)
        width = encoder.hidden_size
        # Without the dropouts of the training, whose places are 0 and 3.
        self.head_layer = nn.Sequential()
        self.head_layer.add_module("1", nn.Linear(2 * width, width))
        self.head_layer.add_module("2", nn.Tanh())
        self.head_layer.add_module("4", nn.Linear(width, tasks))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Logits:
        """Return the logits that the first candidates are better, from ids (B, T) with padding on the right.

        A candidate's number is that of the head over the states at the source mark and at its own mark, side by side. The
        logit is the first candidate's number minus the second's, averaged over the head's outputs.
        """
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        source, first, second = (states[rows, (input_ids == mark).int().argmax(dim=1)] for mark in self.mark_ids)
        left, right = (self.head_layer(torch.cat([source, state], dim=-1)) for state in (first, second))
        return Logits((left - right).mean(dim=-1))
