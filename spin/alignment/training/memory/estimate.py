"""Memory estimate of a training step, made before the first step, and the token budget that fits the free memory.

The bytes that layers save for the backward pass are measured on a few dozen tokens; everything else is computed. All figures
are bytes per process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from spin.alignment.core.errors import InputError
from spin.alignment.logprobs.batch import GROUP_ELEMENTS
from spin.alignment.logprobs.head import _TILE_ELEMENTS
from spin.alignment.training.memory.probe import ActivationCost, ModelStats
from spin.alignment.training.optimizers import WEIGHTS_AT_ONCE

GIB = 2**30

# Optimiser states per weight, and bytes per state (None: same as the weight). Other optimisers are treated like AdamW.
_STATES: dict[str, tuple[float, int | None]] = {
    "rmsprop": (1, None),
    "sgd": (0, None),
    "adagrad": (1, None),
    "adafactor": (0, None),  # only a row and a column per matrix
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_torch_8bit": (2, 1),
    "adamw_torch_4bit": (1, 1),
    "rmsprop_bnb": (1, 4),
    "rmsprop_bnb_32bit": (1, 4),
    "rmsprop_bnb_8bit": (1, 1),
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "lion_32bit": (1, 4),
    "lion_8bit": (1, 1),
    "ademamix": (3, 4),
    "ademamix_8bit": (3, 1),
    # Paged states are moved off the GPU when it is full.
    **{f"paged_{name}": (0, None) for name in ("adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit")},
    **{f"paged_ademamix_{bits}": (0, None) for bits in ("32bit", "8bit")},
}
_LOW_RANK = ("galore", "apollo")

# Activation gradients alive at the same time in a layer's backward pass, as a fraction of what the layer saved for it. Measured
# on Llama, Qwen2, Gemma 2 and GPT-2 in float32 and under bfloat16.
_BACKWARD_SHARE = 0.25

# Fraction of the free memory that a budget may fill: the estimate is accurate to about 20%, and allocators waste some. glibc's
# overhead beyond the tensors was measured at 12 to 60%.
_USABLE = {"cuda": 0.85, "cpu": 0.6}
# Longer rows are not faster: on a CPU they overflow the cache (8192 tokens took 1.06 to 1.15 times as long as 2048).
_LARGEST_BUDGET = {"cuda": 65_536, "cpu": 2048}


@dataclass(frozen=True)
class Sharding:
    """The number of processes over which weights, gradients and optimiser states are sharded.

    Attributes:
        reduction_buffers: DDP keeps a second copy of the gradients, in buckets.
        master_weights: DeepSpeed keeps float32 copies of the trained weights, sharded like the optimiser states.
    """

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    reduction_buffers: bool = False
    master_weights: bool = False

    @classmethod
    def of(cls, accelerator: Any) -> Sharding:
        """Read the sharding from accelerate's plugins."""
        count, kind = accelerator.num_processes, str(accelerator.distributed_type.value)
        if kind == "DEEPSPEED":
            stage = accelerator.state.deepspeed_plugin.zero_stage
            # ZeRO-1 shards optimiser states, ZeRO-2 gradients as well, ZeRO-3 also the weights.
            weights, gradients, optimizer = (count if stage >= first else 1 for first in (3, 2, 1))
            return cls(weights, gradients, optimizer, master_weights=True)
        if kind == "FSDP":
            return cls(count, count, count)
        return cls(reduction_buffers=count > 1)


@dataclass(frozen=True)
class StepSettings:
    """What the memory of a step depends on besides the model and the length of a micro-batch.

    Attributes:
        optim: the optimiser, by its name in transformers.
        device: ``cpu``, ``cuda`` ...
        compute_bytes: bytes per element in matrix products (2 under bfloat16).
        fused_head: whether the head's gradient is computed while its logits exist.
        pair_tokens: tokens of a typical pair; attention that stores its scores needs memory in proportion.
        response_tokens: largest number of response tokens in a pair.
        response_share: response tokens per token of a micro-batch.
        resident: bytes that the process held before the first step besides the weights (see :func:`resident_bytes`).
        reference: bytes of the second copy of the trained weights that online training keeps as its reference.
    """

    optim: str
    device: str
    compute_bytes: int
    pair_tokens: int
    response_tokens: int
    response_share: float
    fused_head: bool = True
    sharding: Sharding = Sharding()
    resident: int = 0
    reference: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the ``moment`` of a step with the highest total."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    copies: int = 0
    activations: int = 0
    head: int = 0
    working: int = 0
    resident: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        return sum(value for value in vars(self).values() if isinstance(value, int))

    def lines(self) -> list[str]:
        """Return the estimate in human-readable form."""
        names = {
            "weights": "weights",
            "gradients": "gradients",
            "optimizer": "optimiser states",
            "copies": "16-bit copies of weights",
            "activations": "activations",
            "head": "logits and head",
            "working": "working space",
            "resident": "interpreter, libraries and data",
            "reference": "reference",
        }
        parts = ", ".join(
            f"{text} {getattr(self, name) / GIB:.2f}" for name, text in names.items() if getattr(self, name)
        )
        return [f"peak memory of a process ({self.moment}): {self.total / GIB:.2f} GiB", f"of which {parts}"]


def estimate_memory(
    stats: ModelStats, cost: ActivationCost, settings: StepSettings, tokens: int, accumulates: bool
) -> MemoryEstimate:
    """Estimate the peak memory of a step whose micro-batches are packed rows of ``tokens`` tokens.

    ``accumulates``: a step has several micro-batches, so gradients already exist during the later forward passes.
    """
    shards = settings.sharding
    gradients = round(stats.trained_bytes / shards.gradients * (2 if shards.reduction_buffers else 1))
    held = gradients if accumulates else 0  # gradients of earlier micro-batches
    base = MemoryEstimate(
        "",
        _weight_bytes(stats, settings),
        0,
        _optimizer_bytes(stats, settings),
        resident=settings.resident,
        reference=settings.reference,
    )
    head = _HeadBytes.of(stats, settings, tokens)
    copies, layer = round(cost.kept.fixed), cost.layer_bytes(tokens, settings.pair_tokens)
    kept = cost.kept.growing(tokens, settings.pair_tokens)
    at_head, in_backward = (cost.plain.fixed, cost.plain.fixed / cost.layers) if cost.checkpointed else (copies, copies)
    recomputed = max(0.0, layer - kept / cost.layers) if cost.checkpointed else 0.0  # the layer's input is kept anyway
    working = round(_BACKWARD_SHARE * layer + tokens * stats.hidden_size * settings.compute_bytes)
    # A tied weight gets its gradient only once the embedding's part is computed; until then the head's part is held.
    waiting = head.gradient if stats.tied else 0
    arrived = gradients if accumulates else gradients - waiting // shards.gradients
    embedding = stats.embedding_bytes * (2 if stats.tied else 1 if accumulates else 0)
    # Memory peaks at different moments depending on the sizes of vocabulary, layers and optimiser states: take the largest.
    moments = (
        replace(base, moment="head", gradients=held, copies=round(at_head), activations=round(kept), head=head.forward),
        replace(
            base,
            moment="start of the backward pass",
            gradients=held,
            copies=round(in_backward),
            activations=round(kept + recomputed),
            head=head.backward,
            working=working,
        ),
        replace(
            base,
            moment="end of the backward pass",
            gradients=arrived,
            copies=round(cost.plain.fixed / cost.layers),
            activations=round(layer),
            head=waiting,
            working=working,
        ),
        replace(base, moment="gradient of the embedding", gradients=arrived, head=waiting, working=embedding),
        replace(base, moment="optimiser step", gradients=gradients, working=_optimizer_working_bytes(stats, settings)),
    )
    return max(moments, key=lambda moment: moment.total)


def _weight_bytes(stats: ModelStats, settings: StepSettings) -> int:
    shards = settings.sharding
    held = stats.weight_bytes / shards.weights
    if shards.weights > 1:
        # Two layers, the embedding and the head are unsharded at a time.
        whole = 2 * stats.layer_weights + stats.embedding_weights + stats.vocab_size * stats.hidden_size
        held += min(whole * settings.compute_bytes, stats.weight_bytes)
    if shards.master_weights:
        held += 4 * stats.trained / shards.optimizer
    return round(held)


def _optimizer_bytes(stats: ModelStats, settings: StepSettings) -> int:
    number, size = _STATES.get(settings.optim, (2, None))
    if settings.optim.startswith(_LOW_RANK):
        return 0
    own = 4 if settings.sharding.master_weights else stats.trained_bytes / max(1, stats.trained)
    found = number * stats.trained * (own if size is None else size)
    if size == 1 and "torch" not in settings.optim:
        # bitsandbytes' 8-bit states have one scale per block of 256; transformers keeps those of embeddings in 32 bits.
        found += number * (stats.trained * 4 / 256 + stats.embedding_weights * 3)
    return round(found / settings.sharding.optimizer)


def state_bytes(optim: str, weights: int, size: int) -> int:
    """Return the bytes that the states of an optimiser take in a checkpoint, for weights of ``size`` bytes each."""
    number, own = _STATES.get(optim.removeprefix("paged_"), (2, None))
    return round(number * weights * (size if own is None else own))


def _optimizer_working_bytes(stats: ModelStats, settings: StepSettings) -> int:
    """Return the temporaries of an update: PyTorch's optimisers create them for one weight on a CPU, for all on a GPU."""
    if settings.optim not in ("rmsprop", "adamw_torch", "adagrad", "adafactor"):
        return 0
    weights = stats.largest
    if settings.device != "cpu" and settings.optim == "rmsprop":
        weights = max(weights, min(WEIGHTS_AT_ONCE, stats.trained))
    elif settings.device != "cpu" and settings.optim != "adafactor":
        weights = stats.trained
    return round(weights * stats.trained_bytes / max(1, stats.trained) / settings.sharding.optimizer)


@dataclass(frozen=True)
class _HeadBytes:
    """Memory of the head: its peak in the forward pass, at the start of the backward pass, and the gradient's part."""

    forward: int
    backward: int
    gradient: int

    @classmethod
    def of(cls, stats: ModelStats, settings: StepSettings, tokens: int) -> _HeadBytes:
        size, vocab, hidden = settings.compute_bytes, stats.vocab_size, stats.hidden_size
        predicted = round(tokens * settings.response_share)
        group = min(predicted, max(GROUP_ELEMENTS // vocab, settings.response_tokens))
        # Bytes of the hidden states (predicted, hidden) and of one group's logits (group, vocab); weights of the head.
        states, logits, table = predicted * hidden * size, group * vocab * size, vocab * hidden
        limit = _TILE_ELEMENTS.get(settings.device, _TILE_ELEMENTS["other"])
        tile = 4 * min(group * vocab, max(limit, vocab))
        narrow = size < 4
        if stats.transforms_logits:
            tile *= 2
        if not settings.fused_head:
            # The logits recomputed in the backward pass also exist in float32.
            return cls(logits + group * vocab * 4 + (tile if narrow else 0) + 2 * states, states, 0)
        # The log-probs of two tiles, and the float32 copy of one.
        tiles = tile * (3 if narrow else 2)
        copy = table * size if size != stats.head_itemsize else 0
        gradient = table * 4 if stats.head_trained else 0
        product = table * (2 if settings.device == "cpu" else 4) if stats.head_trained and narrow else 0
        forward = logits + copy + gradient + max(tiles, product) + 2 * states
        return cls(forward, gradient + states, gradient)


def resident_bytes(device: torch.device, weight_bytes: int) -> int:
    """Return the memory that this process holds besides weights of ``weight_bytes``: interpreter, libraries and data.

    On a CPU that is 0.7 GiB with all libraries, as much as the tensors of a small model. GPU memory contains none of it: 0.
    """
    if device.type != "cpu":
        return 0
    return max(0, psutil.Process().memory_info().rss - weight_bytes)


def available_bytes(device: torch.device, local_processes: int = 1) -> int:
    """Return the memory available to a process: the free memory of its GPU, or its share of the machine's.

    On a CPU, control group limits (containers, Slurm) are respected too.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that PyTorch's allocator has reserved but does not use can be reused.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = min(
        psutil.virtual_memory().available, _control_group_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    )
    return int(free // local_processes)  # the processes of a machine plan at the same time


def _control_group_bytes(membership: Path, root: Path) -> float:
    """Return the memory left by the control groups (v2 or v1) of this process; infinity if they set no limit."""
    try:
        entries = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return float("inf")
    free = [float("inf")]
    for _, controllers, name in entries:
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        folder = base / name.strip("/")
        # Every parent's limit applies too. Inside a container the path may not exist; the container's root is then its own group.
        for group in (folder, *folder.parents):
            free.append(_free_in_group(group, limit, used, cache))
            if group == base:
                break
    return min(free)


def _free_in_group(group: Path, limit: str, used: str, cache: str) -> float:
    try:
        text = (group / limit).read_text(encoding="utf-8").strip()
        if text == "max":
            return float("inf")
        # Inactive file cache is counted as used, but the kernel reclaims it on demand.
        numbers = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return float(text) - int((group / used).read_text(encoding="utf-8")) + int(numbers.get(cache, 0))
    except (OSError, ValueError):
        return float("inf")


def automatic_budget(
    needed_bytes: Callable[[int], int], available: int, longest_pair: int, step_tokens: int, device: str
) -> int:
    """Return the largest number of tokens per micro-batch that fits in memory, with a safety margin.

    ``needed_bytes(tokens)`` is the memory that micro-batches of that length need beyond what is loaded; it must not decrease with
    the length. The result never exceeds the tokens of a step, nor the length beyond which rows get no faster.

    Raises:
        InputError: not even the longest pair fits.
    """
    usable = available * _USABLE.get(device, _USABLE["cpu"])
    if needed_bytes(longest_pair) > usable:
        raise InputError(
            f"the longest row has {longest_pair} tokens and needs about {needed_bytes(longest_pair) / GIB:.1f} GiB beyond what "
            f"is loaded, but only {usable / GIB:.1f} of {available / GIB:.1f} free GiB are planned with: set "
            "gradient_checkpointing: true, lower max_length, use an "
            f"8-bit optimiser, LoRA or more GPUs with ZeRO-3, or try max_tokens_per_batch: {longest_pair} anyway"
        )
    # Binary search: ``fits`` tokens are known to fit, ``too_many`` are not wanted or do not.
    fits, too_many = longest_pair, max(longest_pair, min(step_tokens, _LARGEST_BUDGET.get(device, 16_384))) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needed_bytes(middle) <= usable:
            fits = middle
        else:
            too_many = middle
    return fits
