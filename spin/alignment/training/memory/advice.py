"""Advice when memory runs out: one sentence on what to change instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from spin.alignment.core.errors import InputError

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def advise_when_memory_is_full(sizes: Callable[[], tuple[int, int]], checkpointing: bool) -> Iterator[None]:
    """Run a training; if memory runs out, say what to change.

    ``sizes()`` returns the token budget of a micro-batch (0 if there is none) and the tokens of the longest pair;
    ``checkpointing`` says whether gradient checkpointing is already on.

    Raises:
        InputError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget, longest_pair = sizes()
        raise InputError(advice(budget or longest_pair, longest_pair, checkpointing)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the machine is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def advice(budget: int, longest_pair: int, checkpointing: bool) -> str:
    """Return one sentence on what to change when micro-batches of ``budget`` tokens did not fit."""
    if budget > longest_pair:  # smaller micro-batches are the cheapest change: they do not affect the result
        change = f"run again with --max_tokens_per_batch={max(longest_pair, budget // 2)}"
    elif not checkpointing:
        change = "run again with --gradient_checkpointing=true"
    else:
        change = (
            "run again with an 8-bit optimiser (--optim=adamw_8bit), a lower max_length, LoRA or more GPUs with ZeRO-3"
        )
    return (
        f"out of memory with micro-batches of at most {max(budget, longest_pair)} tokens: {change}; the training resumes "
        "from its last checkpoint"
    )
