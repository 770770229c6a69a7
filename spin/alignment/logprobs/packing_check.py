"""Before training: packed rows must give the log-probs of the model's own forward, whatever its architecture."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.logprobs.attention import PADDED_FIX
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.forward import causal_model
from spin.alignment.logprobs.pair_forward import PairForward

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


def check_packed_forward(forward: PairForward, pairs: PairDataset) -> None:
    """Compare packed and padded log-probs on two shortened ``pairs``. Every process must call it, with the model prepared.

    Raises:
        InputError: they differ: something in this architecture reads the row as one sequence.
    """
    features = short_pairs(pairs, forward.batcher.collator.responses)
    with forward.evaluation():
        packed, padded = forward.logps(features), forward.padded_logps(features)
    difference = (torch.cat(packed) - torch.cat(padded)).abs().mean().item()
    causal = causal_model(forward.model)
    tolerance = _TOLERANCE[torch.bfloat16 if getattr(causal, "is_quantized", False) else forward.dtype]
    if torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, _TOLERANCE[torch.float16])
    if not difference <= tolerance:
        raise InputError(
            f"{type(causal).__name__} gives other log-probs for packed rows than for padded ones (by "
            f"{difference:.2g} nats per token): {PADDED_FIX}"
        )
    logger.info("packed rows give the log-probs of padded ones (mean difference %.1e nats per token)", difference)
