"""Before training: packed rows must give the log-probs of the model's own forward, whatever its architecture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PACKED_ATTENTION, PADDED_MEND
from spin.alignment.logprobs.forward import batch_logps, causal_model, use_attention

if TYPE_CHECKING:
    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.training.trainer import SPINTrainer

logger = logging.getLogger(__name__)

# Mean difference (nats per token) that the order of operations explains. A wrong mask or position costs far more.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_PROMPT_TOKENS, _RESPONSE_TOKENS = 24, 12


def short_pairs(dataset: PairDataset, responses: Sequence[str] = SIDES, count: int = 2) -> list[dict[str, list[int]]]:
    """Return the first pairs of a data set, cut to a few tokens; the responses after the first are shorter ones."""
    found = []
    for index in range(min(count, len(dataset))):
        row = dataset.rows[index]
        pair = {"prompt_ids": list(row["prompt_ids"][-_PROMPT_TOKENS:])}
        for place, name in enumerate(responses):
            pair[f"{name}_ids"] = list(row[f"{name}_ids"][: _RESPONSE_TOKENS * 3 // (3 + place)])
        found.append(pair)
    return found


def check_packed_forward(trainer: SPINTrainer, pairs: PairDataset) -> None:
    """Compare packed and padded log-probs on two shortened ``pairs`` through the prepared model. Every process must call it.

    Raises:
        InputError: they differ: something in this architecture reads the row as one sequence.
    """
    model, device = trainer.model_wrapped, trainer.args.device
    features = short_pairs(pairs, trainer.batcher.collator.responses)
    was_training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        packed = batch_logps(model, trainer.batcher.collate(features, range(len(features)), device).batch)
        use_attention(model, trainer.own_attention)
        try:
            batch = {name: value.to(device) for name, value in trainer.padded_collator(features).items()}
            padded = batch_logps(model, batch)
        finally:
            use_attention(model, PACKED_ATTENTION)
    model.train(was_training)
    difference = (torch.cat(packed) - torch.cat(padded)).abs().mean().item()
    quantised = getattr(causal_model(model), "is_quantized", False)
    tolerance = _TOLERANCE[torch.bfloat16 if quantised else trainer.compute_dtype]
    if torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, _TOLERANCE[torch.float16])
    if not difference <= tolerance:
        raise InputError(
            f"{type(causal_model(model)).__name__} gives other log-probs for packed rows than for padded ones (by "
            f"{difference:.2g} nats per token): {PADDED_MEND}"
        )
    logger.info("packed rows give the log-probs of padded ones (mean difference %.1e nats per token)", difference)
