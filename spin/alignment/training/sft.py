"""TRL's SFTTrainer with this project's defaults. The ids and labels come ready; TRL prepares nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings
from spin.alignment.training.keys import SFTKeys


@dataclass
class SFTArguments(SFTKeys, SFTConfig):
    """Every key of TRL's SFTConfig, with the defaults of :class:`SFTKeys`."""

    dataset_kwargs: dict[str, Any] | None = None
    max_length: int | None = 1024

    def __post_init__(self) -> None:
        check_settings(self)
        if self.packing or self.completion_only_loss is False or self.assistant_only_loss:
            raise InputError(
                "packing, completion_only_loss and assistant_only_loss are set by run_sft.py: remove the key"
            )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class TruthTrainer(SFTTrainer):
    """SFTTrainer whose label smoothing takes one forward pass: TRL adds a second one for its metrics."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean over the response tokens of (1 - e) * NLL + e * (mean over the vocabulary of -log p), in nats."""
        if self.label_smoother is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        loss = self.label_smoother(outputs, inputs["labels"], shift_labels=True, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # tokens are counted over all processes, gradients averaged
        return (loss, outputs) if return_outputs else loss
