"""Full fine-tuning steps without a Trainer: their time, and their peak memory against the estimate made before training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.packing import draw_pairs
from benchmarks.gpu.part import Findings, start_of_peak, timed
from benchmarks.harness import peak_bytes
from benchmarks.shapes import MODELS, PAD_ID, SHAPES, distinct_tokens, make_model
from spin.alignment.logprobs.forward import batch_loss
from spin.alignment.logprobs.pair_forward import PairForward
from spin.alignment.methods.losses import LossInputs
from spin.alignment.methods.losses.sigmoid import sigmoid
from spin.alignment.training.memory.estimate import (
    MemoryEstimate,
    StepSettings,
    estimate_memory,
    resident_bytes,
)
from spin.alignment.training.memory.probe import ModelStats, measure_activations, pass_one_pair
from spin.alignment.training.optimizers import RMSprop

LEARNING_RATE = 5e-7
STEPS = 3  # the first one allocates the optimiser's states and is not timed


@dataclass(frozen=True)
class Case:
    """What is trained: a model of ``shapes.MODELS``, pairs of a shape, the precision of the weights, an optimiser.

    Float32 weights are trained with bfloat16 matrix products. ``budget`` is the largest row in tokens.
    """

    model: str
    shape: str = "uc"
    weights: str = "float32"
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = False
    budget: int = 8192


MEMORY_CASES = {
    "0.5b adamw": Case("0.5b"),
    "0.5b adamw short rows": Case("0.5b", budget=2048),
    "0.5b adamw checkpointing": Case("0.5b", checkpointing=True),
    "0.5b lp rmsprop bfloat16": Case("0.5b", "lp", "bfloat16", "rmsprop"),
    "1.5b adamw": Case("1.5b"),
    "1.5b rmsprop checkpointing": Case("1.5b", "uc", "float32", "rmsprop", checkpointing=True),
}
LARGE_CASES = {
    f"7b {shape} {'checkpointing' if checkpointing else 'plain'}": Case(
        "7b", shape, "bfloat16", "rmsprop", checkpointing, budget=4096
    )
    for shape in ("uc", "lp")
    for checkpointing in (False, True)
}
TINY_CASES = {
    "tiny adamw": Case("tiny", budget=256),
    "tiny lp rmsprop": Case("tiny", "lp", "bfloat16", "rmsprop", checkpointing=True, budget=256),
}


def measure_memory(findings: Findings) -> None:
    """Record steps of models up to 1.5B: estimate and measured peak of the memory, seconds, tokens per second."""
    _measure_cases(findings, MEMORY_CASES)


def measure_large_steps(findings: Findings) -> None:
    """Record the same of steps of a 7B model with bfloat16 weights and RMSprop."""
    _measure_cases(findings, LARGE_CASES)


def _measure_cases(findings: Findings, cases: dict[str, Case]) -> None:
    for name, case in (TINY_CASES if findings.tiny else cases).items():
        findings.attempt(name, partial(measure_case, case, findings.device, findings.tiny))
        start_of_peak(findings.device)  # frees the model also after an error


def measure_case(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """Train a few steps; return estimate, peak and seconds."""
    shape, sizes = SHAPES[case.shape], MODELS[case.model]
    pairs: list[dict[str, Any]] = draw_pairs(case.shape, shape.batch_size, sizes.vocab_size, tiny)
    tokens = sum(map(distinct_tokens, pairs))
    model = make_model(sizes, shape.max_length, 0, device, case.weights)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = StepTrainer(model, case, device)
    estimate = trainer.estimate(pairs)
    scoring, _ = timed(device, partial(trainer.add_reference, pairs))
    start_of_peak(device)
    steps = [timed(device, partial(trainer.step, pairs)) for _ in range(STEPS)]
    peak, seconds = peak_bytes(device), min(seconds for seconds, _ in steps[1:])
    return {
        "case": vars(case),
        "kernel": trainer.forward.kernel,
        "micro_batches": len(trainer.forward.batcher.plan(pairs)),
        "tokens": tokens,
        "reference_seconds": scoring,
        "first_step_seconds": steps[0][0],
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "losses": [loss for _, loss in steps],
        "estimated_bytes": estimate.total,
        "estimated_moment": estimate.moment,
        "estimate": {name: value for name, value in vars(estimate).items() if name != "moment"},
        "peak_bytes": peak,
        "estimated_to_peak": estimate.total / peak,
    }


class StepTrainer:
    """The parts of the project that make up a preference step (packed rows, fused head, loss, optimiser), without a Trainer.

    The Trainer needs packages that a bare machine with a GPU may lack.
    """

    def __init__(self, model: Any, case: Case, device: str) -> None:
        self.model, self.case, self.device = model.train(), case, torch.device(device)
        mixed = case.weights == "float32"
        self.precision = partial(torch.autocast, device, torch.bfloat16) if mixed else nullcontext
        forward = PairForward.of(model, PAD_ID, self.device, torch.bfloat16, 1, self.precision)
        self.forward = forward.packed(case.budget, fused_head=True)
        if case.optimizer == "rmsprop":
            self.optimizer: Any = RMSprop(model.parameters(), lr=LEARNING_RATE)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def estimate(self, pairs: Sequence[dict[str, Any]]) -> MemoryEstimate:
        """Return the estimate of a step with these pairs, as a training makes it before its first step."""
        sizes = [self.forward.tokens(pair) for pair in pairs]
        responses = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
        stats = ModelStats.of(self.model)
        resident = resident_bytes(self.device, stats.weight_bytes)
        with self.autocast():
            cost = measure_activations(self.model, partial(pass_one_pair, self.forward))
        settings = StepSettings(
            optim=self.case.optimizer,
            device=self.device.type,
            compute_bytes=self.forward.dtype.itemsize,
            pair_tokens=sum(sizes) // len(sizes),
            response_tokens=max(responses),
            response_share=sum(responses) / sum(sizes),
            fused_head=self.forward.fused_head,
            resident=resident,
        )
        plan = self.forward.batcher.plan(pairs)
        longest = max(sum(sizes[index] for index in row) for row in plan)
        return estimate_memory(stats, cost, settings, longest, accumulates=len(plan) > 1)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of matrix products in bfloat16."""
        return self.precision()

    def add_reference(self, pairs: Sequence[dict[str, Any]]) -> None:
        """Add the log-probs under the current weights (nats per token) to every pair, as those of the reference."""
        with self.forward.evaluation():
            for row in self.forward.batcher.plan(pairs):
                features = [pairs[index] for index in row]
                logps = [each.tolist() for each in self.forward.logps(features)]
                for number, pair in enumerate(features):
                    pair["chosen_reference"] = logps[number]
                    pair["rejected_reference"] = logps[len(features) + number]

    def step(self, pairs: Sequence[dict[str, Any]]) -> float:
        """Take one optimiser step on all pairs; return its loss."""

        def objective(inputs: LossInputs) -> torch.Tensor:
            return sigmoid(inputs).losses.sum() / len(pairs)

        total = 0.0
        for row in self.forward.batcher.plan(pairs):
            batch = self.forward.batcher.collate(pairs, row, self.device).batch
            with self.autocast():
                loss = batch_loss(self.model, batch, objective)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)
