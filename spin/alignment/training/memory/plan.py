"""Before the first step: the token budget of the micro-batches, and what the memory is expected to hold, in the log."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.logprobs.collators import PackedCollator
from spin.alignment.training.memory.estimate import (
    Sharding,
    StepSettings,
    automatic_budget,
    available_bytes,
    estimate_memory,
)
from spin.alignment.training.memory.probe import ModelStats, measure_activations

if TYPE_CHECKING:
    from spin.alignment.logprobs.batch import PairDataset
    from spin.alignment.training.trainer import SPINTrainer

logger = logging.getLogger(__name__)

BUDGET_FILE = "token_budget.json"


def pair_tokens(dataset: PairDataset, collator: PackedCollator) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that each pair takes in a row, and how many of them are of its responses."""
    import pyarrow.compute as pc

    table = dataset.rows.with_format("arrow")[:]
    names = collator.responses
    prompt, *each = (pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in ("prompt", *names))
    responses = sum(each[1:], each[0])
    return prompt * (1 if collator.share_prompts else len(names)) + responses, responses


def plan_token_budget(trainer: SPINTrainer, pairs: PairDataset, resumed: bool) -> int:
    """Return the tokens of a micro-batch of such ``pairs``: those asked for, else the most that every process has memory for.

    A resumed training keeps the budget it began with: another packing would round differently. The estimate is logged.
    Every process must call it, with the model prepared and in place.

    Raises:
        InputError: not even the longest pair fits.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
    collator = trainer.batcher.collator
    assert isinstance(collator, PackedCollator)
    sizes, responses = pair_tokens(pairs, collator)
    longest = int(sizes.max())
    # The most that one step of this process can hold: its pairs may be the longest of all.
    step_tokens = int(np.sort(sizes)[-arguments.per_device_train_batch_size :].sum())
    stats = ModelStats.of(trainer.model)
    cost = measure_activations(trainer.model, lambda tokens: _pass_one_pair(trainer, tokens))
    settings = StepSettings(
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        device=arguments.device.type,
        compute_bytes=trainer.compute_dtype.itemsize,
        pair_tokens=int(sizes.mean()),
        response_tokens=int(responses.max()),
        response_share=float(responses.sum() / sizes.sum()),
        fused_head=trainer.fused_head,
        sharding=Sharding.of(accelerator),
    )

    def estimate(tokens: int) -> Any:
        return estimate_memory(stats, cost, settings, tokens, accumulates=tokens < step_tokens)

    record = Path(arguments.output_dir) / BUDGET_FILE
    budget = arguments.max_tokens_per_batch
    if budget is None and resumed and record.exists():
        budget = max(longest, int(read_json(record)))
    if budget is None:
        loaded = round(stats.weight_bytes / settings.sharding.weights)
        # The processes of one machine share its memory; torchrun and accelerate say how many they are.
        available = available_bytes(arguments.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        budget = automatic_budget(
            lambda tokens: estimate(tokens).total - loaded, available, longest, step_tokens, arguments.device.type
        )
        if accelerator.num_processes > 1:
            budgets = accelerator.gather(torch.tensor([budget], device=accelerator.device))
            budget = int(budgets.min())
        logger.info("max_tokens_per_batch: %d, chosen for %.1f GiB of free memory", budget, available / 2**30)
    accelerator.wait_for_everyone()  # all have read the record
    if accelerator.is_main_process:
        write_json_atomic(record, budget)
    for line in estimate(budget).lines():
        logger.info(line)
    return budget


def _pass_one_pair(trainer: SPINTrainer, tokens: int) -> torch.Tensor:
    """Pass one made-up pair forward as in training, the same share of the tokens for the prompt and each response.

    Without an objective: the fused head takes gradients on the way, and a measured pass has none.
    """
    names = trainer.batcher.collator.responses
    share = tokens // (1 + len(names))
    pair = {"prompt_ids": [0] * (tokens - len(names) * share)} | {f"{name}_ids": [0] * share for name in names}
    batch = trainer.batcher.collate([pair], [0], trainer.args.device).batch
    # Not through DDP's wrapper: it would wait for the backward pass that never comes.
    trainer.model.train()
    with trainer.compute_loss_context_manager():
        return trainer.model(packed=batch)
