"""The least time that a machine needs for a turn of generation: operations over its rate, and bytes over its bandwidth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import matmul
from benchmarks.shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_READ_BYTES = 2**29  # more than any cache
_READS = 3
_PRECISION = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Work:
    """What a model computes and reads, by token: weights of the layers and of the head, and keys and values in numbers."""

    trunk: int
    head: int
    kv: int
    bytes_per_number: int


@dataclass(frozen=True)
class Machine:
    """Operations per second in matrix products, and bytes per second that can be read from memory."""

    flops: float
    bandwidth: float


def work_of(config: PretrainedConfig, dtype: str) -> Work:
    """Return the work of a Llama-shaped model."""
    width, layers = config.hidden_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    kv = size * config.num_key_value_heads
    layer = 2 * width * size * config.num_attention_heads + 2 * width * kv + 3 * width * config.intermediate_size
    numbers = 2 if dtype == "bfloat16" else 4
    return Work(layers * layer, width * config.vocab_size, 2 * layers * kv, numbers)


def measure_machine(config: PretrainedConfig, dtype: str, threads: int, clock: str) -> Machine:
    """Measure both rates with a number of threads, on the ``clock`` of the turns (a key of their seconds); the best of a few
    attempts, because other jobs may run."""
    import torch

    shape = ModelShape(
        "llama",
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    now = time.perf_counter if clock == "wall_seconds" else time.process_time
    torch.set_num_threads(threads)
    products = matmul.LayerProducts(shape, _PRECISION[dtype], "cpu")
    rates = []
    for _ in range(_READS + 1):
        started = now()
        done = products.multiply(0.5)
        rates.append(done / (now() - started))
    memory = torch.zeros(_READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(_READS + 1):  # the first read is a warm-up
        started = now()
        memory.sum()
        seconds.append(now() - started)
    return Machine(max(rates), _READ_BYTES / min(seconds))


def limit_seconds(work: Work, machine: Machine, prompts: Sequence[int], responses: Sequence[int]) -> float:
    """Return the least time for prompts and responses of these lengths (tokens), all in one batch.

    Prompts are bound by operations. A step of decoding is bound by operations, or by reading all weights once and the keys and
    values of every running row; attention's operations are not counted.
    """
    prefill = 2 * (work.trunk * sum(prompts) + work.head * len(prompts))
    decoded = [length - 1 for length in responses]  # the first token comes from the prompt's pass
    operations = 2 * (work.trunk + work.head) * sum(decoded)
    # A row reads its prompt and what it has decoded: P + 1, P + 2, ... columns.
    columns = sum(steps * prompt + steps * (steps + 1) / 2 for prompt, steps in zip(prompts, decoded, strict=True))
    numbers = (work.trunk + work.head) * max(decoded) + work.kv * columns
    return prefill / machine.flops + max(
        operations / machine.flops, numbers * work.bytes_per_number / machine.bandwidth
    )


def add_limit(
    result: dict[str, Any], seats: dict[str, Any], folder: Path, dtype: str, threads: int, clock: str
) -> None:
    """Add the machine's rates, and to each contender the share of the limit that its median turn reached."""
    from statistics import median

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    work, machine = work_of(config, dtype), measure_machine(config, dtype, threads, clock)
    result["limit"] = {**asdict(machine), **asdict(work)}
    for name, seat in seats.items():
        if seat.error:
            continue
        shares = [
            limit_seconds(work, machine, turn["prompt_lengths"], turn["response_lengths"]) / turn[clock]
            for turn in seat.turns[1:]
        ]
        result["contenders"][name]["limit_fraction"] = median(shares)
