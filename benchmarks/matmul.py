"""The machine's rate of matrix products at the sizes of the model, measured in turns with the contenders."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns

NAME = "matmul"
_TOKENS = {"cpu": 2048, "cuda": 8192}
_SECONDS = 1.0


def run(job: Job, turns: Turns) -> None:
    """Report the operations of every turn as ``flops``: all matrices of a decoder layer, forward pass, again and again."""
    import torch

    config = json.loads((Path(job.model_folder) / "config.json").read_text(encoding="utf-8"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    # Outputs and inputs of the projections to query, key, value, output, gate, up and down.
    sizes = [(width, width), (kv, width), (kv, width), (width, width), (inner, width), (inner, width), (width, inner)]
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    tokens = _TOKENS[job.device]
    weights = [torch.randn(size, device=job.device).to(dtype) for size in sizes]
    rows = {size: torch.randn(tokens, size, device=job.device).to(dtype) for size in (width, inner)}
    flops = sum(2 * tokens * outputs * inputs for outputs, inputs in sizes)

    def multiply() -> int:
        rounds, started = 0, time.perf_counter()
        while time.perf_counter() - started < _SECONDS:
            for weight in weights:
                torch.nn.functional.linear(rows[weight.shape[1]], weight)
            if job.device == "cuda":
                torch.cuda.synchronize()
            rounds += 1
        return rounds * flops

    turns.baseline()
    turns.ready()
    for _ in range(2 + job.reps):  # the turns of the opponent, of the warm-up and of the steps
        turns.begin()
        turns.end(flops=multiply())
