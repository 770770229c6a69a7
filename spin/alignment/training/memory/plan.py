"""Chooses the token budget of micro-batches before the first step, and logs the expected memory use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator

from spin.alignment.core.content_hash import is_damaged, sealed_file
from spin.alignment.logprobs.batch import PairDataset
from spin.alignment.logprobs.collators import PackedCollator, lengths_of
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.training.config import SPINConfig
from spin.alignment.training.memory.estimate import (
    Sharding,
    StepSettings,
    automatic_budget,
    available_bytes,
    estimate_memory,
    resident_bytes,
)
from spin.alignment.training.memory.probe import ModelStats, measure_activations, pass_one_pair

if TYPE_CHECKING:
    from spin.alignment.training.sft_config import SFTArguments

logger = logging.getLogger(__name__)

BUDGET_FILE = "token_budget.json"


def pair_tokens(dataset: PairDataset, collator: PackedCollator) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that each of N pairs takes up in a row, and how many belong to its responses; both ``(N,)``."""
    return collator.tokens_of(dataset.rows), np.sum(lengths_of(dataset.rows, collator.responses), axis=0)


def plan_token_budget(
    forward: PairForward,
    pairs: PairDataset,
    arguments: SPINConfig | SFTArguments,
    accelerator: Accelerator,
    resumed: bool,
    keeps_reference: bool = False,
) -> int:
    """Return the token budget for micro-batches of such ``pairs``: the configured one, else the largest that fits every process.

    A resumed run keeps its original budget: a different packing would round differently. The estimate is logged.
    ``keeps_reference``: every step has a second copy of the trained weights, sharded like them.
    Every process must call it, with the model prepared but without DDP's wrapper: the wrapper would wait for a backward pass,
    which a measured forward pass never has.

    Raises:
        InputError: not even the longest pair fits.
    """
    collator = forward.batcher.collator
    assert isinstance(collator, PackedCollator)
    sizes, responses = pair_tokens(pairs, collator)
    longest = int(sizes.max())
    # Upper bound of the tokens in one step of this process: its pairs may be the longest of all.
    step_tokens = int(np.sort(sizes)[-arguments.per_device_train_batch_size :].sum())
    stats = ModelStats.of(forward.model)
    resident = resident_bytes(
        arguments.device, stats.weight_bytes
    )  # before measuring, which leaves freed memory behind
    cost = measure_activations(forward.model, lambda tokens: pass_one_pair(forward, tokens))
    sharding = Sharding.of(accelerator)
    settings = StepSettings(
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        device=arguments.device.type,
        compute_bytes=forward.dtype.itemsize,
        pair_tokens=int(sizes.mean()),
        response_tokens=int(responses.max()),
        response_share=float(responses.sum() / sizes.sum()),
        fused_head=forward.fused_head,
        sharding=sharding,
        resident=resident,
        reference=round(stats.trained_bytes / sharding.weights) if keeps_reference else 0,
    )

    def estimate(tokens: int) -> Any:
        return estimate_memory(stats, cost, settings, tokens, accumulates=tokens < step_tokens)

    record = Path(arguments.output_dir) / BUDGET_FILE
    budget = arguments.max_tokens_per_batch
    if budget is None and resumed and record.exists():
        text = "" if is_damaged(record) else record.read_text(encoding="utf-8", errors="replace").strip()
        if text.isdecimal():
            budget = max(longest, int(text))
        else:
            logger.warning("%s is damaged: the budget is planned again, so rounding may differ from before", record)
    if budget is None:
        loaded = round(stats.weight_bytes / settings.sharding.weights) + resident
        budget = _fitting_budget(lambda tokens: estimate(tokens).total - loaded, longest, step_tokens, accelerator)
    accelerator.wait_for_everyone()  # until all processes have read the record
    if accelerator.is_main_process:
        with sealed_file(record) as file:
            file.write(f"{budget}\n".encode())
    for line in estimate(budget).lines():
        logger.info(line)
    return budget


def _fitting_budget(
    needed_bytes: Callable[[int], int], longest_pair: int, step_tokens: int, accelerator: Accelerator
) -> int:
    """Return the largest number of tokens per micro-batch that fits in the free memory of every process."""
    # The processes on one machine share its memory; torchrun and accelerate set their number.
    available = available_bytes(accelerator.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    budget = automatic_budget(needed_bytes, available, longest_pair, step_tokens, accelerator.device.type)
    if accelerator.num_processes > 1:
        budgets = accelerator.gather(torch.tensor([budget], device=accelerator.device))
        budget = int(budgets.min())
    logger.info("max_tokens_per_batch: %d, chosen for %.1f GiB of free memory", budget, available / 2**30)
    return budget
