"""The machine's rate of matrix products at the sizes of the model, measured as a contender that takes turns, and by precision."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.shapes import MODELS

if TYPE_CHECKING:
    from benchmarks.harness import Job, Turns
    from benchmarks.shapes import ModelShape

NAME = "matmul"
PRECISIONS = ("bf16", "fp32")
_TOKENS = {"cpu": 2048, "cuda": 8192}


class LayerProducts:
    """The matrix products of one decoder layer's forward pass, without attention."""

    def __init__(self, shape: ModelShape, precision: str, device: str) -> None:
        import torch

        width, inner = shape.hidden_size, shape.intermediate_size
        kv = width // shape.num_attention_heads * shape.num_key_value_heads
        # Outputs and inputs of the projections to query, key, value, output, gate, up and down.
        sizes = [
            (width, width),
            (kv, width),
            (kv, width),
            (width, width),
            (inner, width),
            (inner, width),
            (width, inner),
        ]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        tokens = _TOKENS[device]
        self._device = device
        self._weights = [torch.randn(size, device=device).to(dtype) for size in sizes]
        self._rows = {size: torch.randn(tokens, size, device=device).to(dtype) for size in (width, inner)}
        self._flops = sum(2 * tokens * outputs * inputs for outputs, inputs in sizes)

    def multiply(self, seconds: float) -> int:
        """Multiply again and again, at least once; return the number of operations."""
        import torch

        done, started = 0, time.perf_counter()
        while not done or time.perf_counter() - started < seconds:
            for weight in self._weights:
                torch.nn.functional.linear(self._rows[weight.shape[1]], weight)
            if self._device == "cuda":
                torch.cuda.synchronize()
            done += self._flops
        return done


def rates(shape: ModelShape, device: str, threads: int) -> dict[str, float]:
    """Return the operations per second in each precision; a CPU without bf16 instructions is many times slower in bf16."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    for precision in PRECISIONS:
        products = LayerProducts(shape, precision, device)
        products.multiply(0)
        started = time.perf_counter()
        found[precision] = products.multiply(0.5) / (time.perf_counter() - started)
    return found


def run(job: Job, turns: Turns) -> None:
    """Report the operations of every turn as ``flops``."""
    products = LayerProducts(MODELS[job.model], job.precision, job.device)
    products.multiply(0)
    turns.baseline()
    turns.ready()
    for _ in range(2 + job.reps):  # the turns of the reference pass, of the warm-up and of the steps
        turns.begin()
        turns.end(flops=products.multiply(1))
