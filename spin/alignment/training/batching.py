"""How the pairs of a training are batched: set up when the trainer is made, checked and sized when the model is prepared."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spin.alignment.logprobs.attention import PACKED_ATTENTION
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.forward import use_attention
from spin.alignment.logprobs.packing_check import check_packed_forward
from spin.alignment.logprobs.pair_forward import PairForward, compute_dtype
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.memory.plan import plan_token_budget

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def make_pair_forward(
    model: Any, opponent: Any | None, args: SPINConfig, tokenizer: Any, accelerator: Accelerator
) -> PairForward:
    """Return how pairs pass the policy. Where rows are packed, it and a frozen ``opponent`` learn to take them.

    Raises:
        InputError: rows cannot be packed for this architecture, or the kernel asked for does not work here.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    dtype = compute_dtype(model, accelerator.mixed_precision)
    responses, pairs = args.loss.responses, args.pairs_per_micro_batch
    forward = PairForward.of(model, pad_id, args.device, dtype, pairs, accelerator.autocast, responses)
    if args.batching == "padded":
        return forward
    fused_head = args.fused_head and opponent is None
    forward = forward.packed(args.max_tokens_per_batch or 0, args.packed_attention, args.share_prompts, fused_head)
    if opponent is not None:
        use_attention(opponent, PACKED_ATTENTION)
        logger.info("alpha is %g: a copy of the opponent stands beside the policy, fused_head is off", args.alpha)
    head = "fused head" if forward.fused_head else "head recomputed in the backward pass"
    logger.info("packed rows: attention kernel %s, %s", forward.kernel, head)
    return forward


def fit_to_model(
    forward: PairForward,
    prepared: Any,
    unwrapped: Any,
    pairs: PairDataset,
    args: SPINConfig,
    accelerator: Accelerator,
    resumed: bool,
) -> PairForward:
    """Return the same for the ``prepared`` model, with the token budget that pairs like these and the memory allow.

    ``unwrapped`` is the prepared model without DDP's wrapper. Every process must call it.

    Raises:
        InputError: packed rows do not give this model's log-probs, or not even the longest pair fits.
    """
    forward = replace(forward, model=prepared)
    if forward.kernel is None:
        return forward
    check_packed_forward(forward, pairs)
    return forward.with_budget(plan_token_budget(replace(forward, model=unwrapped), pairs, args, accelerator, resumed))
