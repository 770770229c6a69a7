"""Memory of a training process in a plan: the estimate of training/memory, with sizes from formulas instead of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spin.alignment.core.config import read_mapping
from spin.alignment.core.errors import InputError
from spin.alignment.core.machine import GIB
from spin.alignment.pipeline.planning.arithmetic import Lengths, ModelShape
from spin.alignment.pipeline.planning.devices import Fleet
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.training.memory.estimate import (
    Sharding,
    StepSettings,
    automatic_budget,
    estimate_memory,
    state_bytes,
)
from spin.alignment.training.memory.probe import ActivationCost, Growth, ModelStats

# Interpreter and libraries of a training process on a CPU (measured, see resident_bytes).
_RESIDENT = round(0.7 * GIB)
# What is offloaded is as good as sharded over this many devices: only the part that is being computed is on one.
_NOTHING_LEFT = 10**9


@dataclass(frozen=True)
class Parallelism:
    """How a training is distributed (``launch.config_file``): what is sharded, and what is moved to the memory of the host."""

    sharding: Sharding
    offloads_states: bool = False
    offloads_weights: bool = False
    name: str = "one process"

    @property
    def is_deepspeed(self) -> bool:
        return self.sharding.master_weights


def parallelism(launch: LaunchConfig, processes: int) -> Parallelism:
    """Return how ``processes`` processes share a training."""
    values = read_mapping(Path(launch.config_file)) if launch.config_file else {}
    kind = str(values.get("distributed_type", "MULTI_GPU"))
    if kind == "DEEPSPEED":
        section = values.get("deepspeed_config") or {}
        stage = int(section.get("zero_stage", 2))
        weights, gradients, states = (processes if stage >= first else 1 for first in (3, 2, 1))
        return Parallelism(
            Sharding(weights, gradients, states, master_weights=True),
            offloads_states=section.get("offload_optimizer_device") in ("cpu", "nvme"),
            offloads_weights=section.get("offload_param_device") in ("cpu", "nvme"),
            name=f"DeepSpeed ZeRO-{stage} of {processes}",
        )
    if kind == "FSDP":
        return Parallelism(Sharding(processes, processes, processes), name=f"FSDP of {processes}")
    return Parallelism(
        Sharding(reduction_buffers=processes > 1), name=f"DDP of {processes}" if processes > 1 else "one process"
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one process.

    Attributes:
        device, host: bytes on the device, and bytes of offloaded weights and states in the host's memory.
        fits: whether micro-batches of the longest pair fit; ``budget`` is the number of tokens that would be chosen (0: none).
    """

    device: float
    host: float
    fits: bool
    budget: int
    detail: str


def weight_itemsize(values: Mapping[str, Any]) -> float:
    """Return the bytes of a weight in training: of its ``dtype``, or those of a quantised base model."""
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return 0.5 if values.get("load_in_4bit") else 1.0
    return 2 if values.get("dtype") in ("bfloat16", "float16") else 4


def training_memory(
    shape: ModelShape, values: Mapping[str, Any], lengths: Lengths, responses: int, layout: Parallelism, fleet: Fleet
) -> TrainingMemory:
    """Estimate the memory of a training process; ``responses`` in a row are two for pairs and one for SFT."""
    stats, settings = _stats(shape, values), _settings(shape, values, lengths, responses, layout, fleet)
    cost = activation_cost(shape, values)
    longest = longest_row(values, lengths, responses)
    batch = int(values.get("per_device_train_batch_size", 8)) * longest

    def estimate(tokens: int) -> Any:
        return estimate_memory(stats, cost, settings, tokens, accumulates=tokens < batch)

    available = round(fleet.device.memory * GIB)
    budget = values.get("max_tokens_per_batch")
    try:
        found = automatic_budget(
            lambda tokens: estimate(tokens).total, available, longest, max(longest, batch), fleet.device.kind
        )
        fits = budget is None or estimate(max(longest, int(budget))).total <= available
    except InputError:
        found, fits = 0, False
    chosen = max(longest, int(budget)) if budget is not None else max(found, longest)
    peak = estimate(chosen)
    return TrainingMemory(
        peak.total, _host_bytes(stats, settings, layout), fits, chosen if fits else 0, "; ".join(peak.lines())
    )


def longest_row(values: Mapping[str, Any], lengths: Lengths, responses: int) -> int:
    """Return the tokens of the longest row that ``max_length`` admits: a prompt of mean length, and responses that fill it."""
    max_length = int(values.get("max_length", 1024))
    prompt = min(round(lengths.prompt), max_length - 1)
    return prompt + responses * (max_length - prompt)


def _stats(shape: ModelShape, values: Mapping[str, Any]) -> ModelStats:
    """Return the weights as the probe would count them on the loaded model."""
    itemsize = weight_itemsize(values)
    adapters = bool(values.get("use_peft"))
    trained = adapter_weights(shape, int(values.get("lora_r", 16))) if adapters else shape.weights
    trained_bytes = trained * (4 if adapters else itemsize)
    table = 0 if adapters else shape.table_weights
    return ModelStats(
        weight_bytes=round(shape.weights * itemsize + (trained_bytes if adapters else 0)),
        trained=trained,
        trained_bytes=round(trained_bytes),
        largest=max(shape.table_weights, shape.hidden * shape.intermediate),
        layer_weights=shape.layer_weights,
        embedding_weights=table,
        embedding_bytes=round(table * itemsize),
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        head_itemsize=2 if itemsize <= 2 else 4,
        head_trained=not adapters,
        tied=shape.tied and not adapters,
        transforms_logits=False,
    )


def adapter_weights(shape: ModelShape, rank: int) -> int:
    """Return the weights of LoRA adapters on the seven linear modules of every layer: rank * (inputs + outputs) for each."""
    h, q, k, i = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    return shape.layers * rank * ((h + q) + 2 * (h + k) + (q + h) + 3 * (h + i))


def activation_cost(shape: ModelShape, values: Mapping[str, Any]) -> ActivationCost:
    """Return what the layers save for the backward pass.

    Per token and layer, in the precision of the matrix products: what the two norms normalise and return (4 h), queries, the
    output of attention and its copy (3 q), keys and values (2 k), and four times the MLP's width; in float32, the inputs of the
    norms.
    """
    compute = _compute_bytes(values)
    h, q, k = shape.hidden, shape.query_width, shape.key_width
    per_layer = compute * (4 * h + 3 * q + 2 * k + 4 * shape.intermediate) + 2 * 4 * h
    itemsize = weight_itemsize(values)
    # Under autocast, layers keep 16-bit copies of 32-bit weights until their backward pass.
    copies = shape.layers * shape.layer_weights * compute if itemsize == 4 and compute == 2 else 0
    plain = Growth(copies, shape.layers * per_layer, 0)
    if not values.get("gradient_checkpointing"):
        return ActivationCost(plain, plain, shape.layers, checkpointed=False)
    inputs = shape.layers * h * (2 if itemsize <= 2 else 4)
    return ActivationCost(Growth(0, inputs, 0), plain, shape.layers, checkpointed=True)


def _compute_bytes(values: Mapping[str, Any]) -> int:
    return 2 if values.get("bf16") or values.get("fp16") or weight_itemsize(values) <= 2 else 4


def _settings(
    shape: ModelShape,
    values: Mapping[str, Any],
    lengths: Lengths,
    responses: int,
    layout: Parallelism,
    fleet: Fleet,
) -> StepSettings:
    answers = lengths.ground_truth + (lengths.response if responses > 1 else 0)
    # With offloaded optimiser states, their memory and that of float32 weights and gradients is the host's.
    offloaded = layout.offloads_states
    sharding = layout.sharding
    if offloaded:
        sharding = replace(sharding, master_weights=False, gradients=_NOTHING_LEFT)
    if layout.offloads_weights:
        sharding = replace(sharding, weights=_NOTHING_LEFT)
    return StepSettings(
        optim="sgd" if offloaded else str(values.get("optim", "rmsprop")),
        device=fleet.device.kind,
        compute_bytes=_compute_bytes(values),
        pair_tokens=round(lengths.prompt + answers),
        response_tokens=responses * int(values.get("max_length", 1024)),
        response_share=answers / max(1.0, lengths.prompt + answers),
        fused_head=bool(values.get("fused_head", True)),
        sharding=sharding,
        resident=_RESIDENT if fleet.device.kind == "cpu" else 0,
    )


def _host_bytes(stats: ModelStats, settings: StepSettings, layout: Parallelism) -> float:
    """Return what DeepSpeed keeps of one process in the host's memory: float32 weights and gradients, states, and the weights."""
    states = 0.0
    if layout.offloads_states:
        # Adam's two moments: what DeepSpeed's own CPU optimiser keeps.
        states = (4 + 4 + state_bytes("adamw_torch", 1, 4)) * stats.trained / layout.sharding.optimizer
    weights = stats.weight_bytes / layout.sharding.weights if layout.offloads_weights else 0
    return states + weights
