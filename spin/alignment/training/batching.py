"""Batching of pairs and of SFT rows: configured when the trainer is built, checked and sized once the model is prepared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.batch import PairDataset, PairList
from spin.alignment.logprobs.forward import causal_model
from spin.alignment.logprobs.packing_check import check_packed_forward
from spin.alignment.logprobs.pair_forward import PairForward, compute_dtype
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.filler_rows import real_rows
from spin.alignment.training.memory.plan import plan_token_budget

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spin.alignment.training.sft_config import SFTArguments

logger = logging.getLogger(__name__)


def collate_pairs(rows: Sequence[Any]) -> PairList:
    """Return the rows of a batch that count; if all of them are fillers, a stand-in that does not count."""
    return PairList(real_rows(rows)) if real_rows(rows) else PairList([rows[0].row], is_stand_in=True)


def make_pair_forward(
    model: Any,
    args: SPINConfig | SFTArguments,
    tokenizer: Any,
    accelerator: Accelerator,
    responses: tuple[str, ...],
    position_kl: bool = False,
    share_prompts: bool = True,
    fused_head: bool = True,
) -> PairForward:
    """Return the forward pass of rows with these ``responses``; with packing, patch the policy to accept packed rows.

    ``position_kl``: losses receive the KL from the reference at each position.

    Raises:
        InputError: this architecture does not support packed rows, or the requested kernel does not work here.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    dtype = compute_dtype(model, accelerator.mixed_precision)
    pairs = args.pairs_per_micro_batch
    forward = PairForward.of(model, pad_id, args.device, dtype, pairs, accelerator.autocast, responses)
    if args.batching == "padded":
        return forward
    # The KL term needs the full distributions of both models, which a fused head never holds at the same time.
    fused_head = fused_head and not position_kl
    forward = forward.packed(args.max_tokens_per_batch or 0, args.packed_attention, share_prompts, fused_head)
    if position_kl:
        check_head(causal_model(model))
        logger.info("alpha is above 0: keeping the reference's weights in memory, fused_head is off")
    head = "fused head" if forward.fused_head else "head recomputed in the backward pass"
    logger.info("packed rows: attention kernel %s, %s", forward.kernel, head)
    return forward


def check_head(causal: Any) -> None:
    """Check that the head of a causal language model is one matrix, which the reference's can be copied from.

    Raises:
        InputError: it is not.
    """
    head = causal.get_output_embeddings()
    if not isinstance(getattr(head, "base_layer", head), torch.nn.Linear):
        raise InputError(
            f"alpha needs an output head that is one matrix, but that of {type(causal).__name__} is a {type(head).__name__}: "
            "set batching: padded, or alpha to 0"
        )


def fit_to_model(
    forward: PairForward,
    prepared: Any,
    unwrapped: Any,
    pairs: PairDataset,
    args: SPINConfig | SFTArguments,
    accelerator: Accelerator,
    resumed: bool,
    keeps_reference: bool = False,
) -> PairForward:
    """Return ``forward`` for the ``prepared`` model, with a token budget chosen for these pairs and the free memory.

    ``unwrapped`` is the prepared model without DDP's wrapper; ``keeps_reference``: every step has a second copy of the trained
    weights. Every process must call it.

    Raises:
        InputError: packed rows change this model's log-probs, or not even the longest pair fits.
    """
    forward = replace(forward, model=prepared)
    if forward.kernel is None:
        return forward
    check_packed_forward(forward, pairs)
    planned = replace(forward, model=unwrapped)
    return forward.with_budget(plan_token_budget(planned, pairs, args, accelerator, resumed, keeps_reference))
