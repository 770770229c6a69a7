"""What a training step needs of memory and what there is: an estimate before the first step, and the token budget it allows.

The bytes that layers keep for the backward pass are measured, on a few dozen tokens; everything else is counted. All figures
are bytes of one process.
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

# States that an optimiser keeps for each weight, and bytes of one; None: as many as the weight's. Others are taken for AdamW.
_STATES: dict[str, tuple[float, int | None]] = {
    "rmsprop": (1, None),
    "sgd": (0, None),
    "adagrad": (1, None),
    "adafactor": (0, None),  # a row and a column for each matrix
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
    # Paged states leave the GPU when it is full.
    **{f"paged_{name}": (0, None) for name in ("adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit")},
    **{f"paged_ademamix_{bits}": (0, None) for bits in ("32bit", "8bit")},
}
_LOW_RANK = ("galore", "apollo")

# Gradients of activations alive at once in the backward pass of a layer, as a share of what the layer keeps for it. Measured on
# Llama, Qwen2, Gemma 2 and GPT-2 in float32 and under bfloat16.
_BACKWARD_SHARE = 0.25

# Share of the free memory that a budget may fill: the estimate is good to about a fifth, and allocators waste some. What glibc
# holds beyond the tensors came to between an eighth and three fifths.
_USABLE = {"cuda": 0.85, "cpu": 0.6}
# Longer rows do not run faster: on a CPU they leave its cache (8192 tokens took 1.06 to 1.15 times as long as 2048).
_LARGEST_BUDGET = {"cuda": 65_536, "cpu": 2048}


@dataclass(frozen=True)
class Sharding:
    """Over how many processes weights, gradients and optimiser states are spread.

    Attributes:
        reduction_buffers: DDP keeps a second copy of the gradients, in buckets.
        master_weights: DeepSpeed keeps float32 copies of the trained weights, spread as the optimiser states are.
    """

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    reduction_buffers: bool = False
    master_weights: bool = False

    @classmethod
    def of(cls, accelerator: Any) -> Sharding:
        """Read it from accelerate's plugins."""
        count, kind = accelerator.num_processes, str(accelerator.distributed_type.value)
        if kind == "DEEPSPEED":
            stage = accelerator.state.deepspeed_plugin.zero_stage
            weights, gradients, optimizer = (count if stage >= first else 1 for first in (3, 2, 1))
            return cls(weights, gradients, optimizer, master_weights=True)
        if kind == "FSDP":
            return cls(count, count, count)
        return cls(reduction_buffers=count > 1)


@dataclass(frozen=True)
class StepSettings:
    """What the memory of a step depends on, besides the model and the length of a micro-batch.

    Attributes:
        optim: the optimiser, by transformers' name.
        device: ``cpu``, ``cuda`` ...
        compute_bytes: bytes of a number in matrix products (2 under bfloat16).
        fused_head: the head's gradient is taken while its logits exist.
        pair_tokens: tokens of a typical pair; attention that keeps its scores costs in proportion.
        response_tokens: the most response tokens of a pair.
        response_share: response tokens per token of a micro-batch.
    """

    optim: str
    device: str
    compute_bytes: int
    pair_tokens: int
    response_tokens: int
    response_share: float
    fused_head: bool = True
    sharding: Sharding = Sharding()


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the moment of a step at which they are most."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    copies: int = 0
    activations: int = 0
    head: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return sum(value for value in vars(self).values() if isinstance(value, int))

    def lines(self) -> list[str]:
        """Return the estimate for people."""
        names = {
            "weights": "weights",
            "gradients": "gradients",
            "optimizer": "optimiser states",
            "copies": "16-bit copies of weights",
            "activations": "activations",
            "head": "logits and head",
            "working": "working space",
        }
        parts = ", ".join(
            f"{text} {getattr(self, name) / GIB:.2f}" for name, text in names.items() if getattr(self, name)
        )
        return [f"memory of a process at its peak ({self.moment}): {self.total / GIB:.2f} GiB", f"of it {parts}"]


def estimate_memory(
    stats: ModelStats, cost: ActivationCost, settings: StepSettings, tokens: int, accumulates: bool
) -> MemoryEstimate:
    """Estimate the peak of a step whose micro-batches are packed rows of ``tokens`` tokens.

    ``accumulates``: a step has several micro-batches, so gradients exist while the later ones pass forward.
    """
    shards = settings.sharding
    gradients = round(stats.trained_bytes / shards.gradients * (2 if shards.reduction_buffers else 1))
    held = gradients if accumulates else 0
    base = MemoryEstimate("", _weight_bytes(stats, settings), 0, _optimizer_bytes(stats, settings))
    head = _HeadBytes.of(stats, settings, tokens)
    copies, layer = round(cost.kept.fixed), cost.layer_bytes(tokens, settings.pair_tokens)
    kept = cost.kept.growing(tokens, settings.pair_tokens)
    at_head, in_backward = (cost.plain.fixed, cost.plain.fixed / cost.layers) if cost.checkpointed else (copies, copies)
    recomputed = max(0.0, layer - kept / cost.layers) if cost.checkpointed else 0.0  # its input is kept anyway
    working = round(_BACKWARD_SHARE * layer + tokens * stats.hidden_size * settings.compute_bytes)
    # A tied weight gets its gradient when the embedding's part is there too: until then the head's part waits.
    waiting = head.gradient if stats.tied else 0
    arrived = gradients if accumulates else gradients - waiting // shards.gradients
    embedding = stats.embedding_bytes * (2 if stats.tied else 1 if accumulates else 0)
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
        # Two layers, the embedding and the head are whole at a time.
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
        # bitsandbytes' 8-bit states have a scale for every 256; transformers keeps those of embeddings in 32 bits.
        found += number * (stats.trained * 4 / 256 + stats.embedding_weights * 3)
    return round(found / settings.sharding.optimizer)


def _optimizer_working_bytes(stats: ModelStats, settings: StepSettings) -> int:
    """Temporaries of one update: PyTorch's own optimisers make them for one weight on a CPU, for all on a GPU."""
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
    """What the head holds: at its peak in the forward pass, when the backward pass starts, and of these its gradient."""

    forward: int
    backward: int
    gradient: int

    @classmethod
    def of(cls, stats: ModelStats, settings: StepSettings, tokens: int) -> _HeadBytes:
        size, vocab, hidden = settings.compute_bytes, stats.vocab_size, stats.hidden_size
        predicted = round(tokens * settings.response_share)
        group = min(predicted, max(GROUP_ELEMENTS // vocab, settings.response_tokens))
        states, logits, table = predicted * hidden * size, group * vocab * size, vocab * hidden
        limit = _TILE_ELEMENTS.get(settings.device, _TILE_ELEMENTS["other"])
        tile = 4 * min(group * vocab, max(limit, vocab))
        narrow = size < 4
        if stats.transforms_logits:
            tile *= 2
        if not settings.fused_head:
            # Made again in the backward pass, they are there in float32 too.
            return cls(logits + group * vocab * 4 + (tile if narrow else 0) + 2 * states, states, 0)
        # The log-probs of two tiles at a time, and the float32 copy of one.
        tiles = tile * (3 if narrow else 2)
        copy = table * size if size != stats.head_itemsize else 0
        gradient = table * 4 if stats.head_trained else 0
        product = table * (2 if settings.device == "cpu" else 4) if stats.head_trained and narrow else 0
        forward = logits + copy + gradient + max(tiles, product) + 2 * states
        return cls(forward, gradient + states, gradient)


def available_bytes(device: torch.device, local_processes: int = 1) -> int:
    """Return the memory that a process may still take: free memory of its GPU, or its share of the machine's.

    On a CPU the limits of the control group (containers, Slurm) count as well.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = min(
        psutil.virtual_memory().available, _control_group_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    )
    return int(free // local_processes)


def _control_group_bytes(membership: Path, root: Path) -> float:
    """Return what the control groups (version 2 or 1) of this process leave free; infinity where they set no limit."""
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
        # The limit of every parent holds too; inside a container the name may lead nowhere, then its root is its own group.
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
        numbers = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return float(text) - int((group / used).read_text(encoding="utf-8")) + int(numbers.get(cache, 0))
    except (OSError, ValueError):
        return float("inf")


def automatic_budget(
    needed_bytes: Callable[[int], int], available: int, longest_pair: int, step_tokens: int, device: str
) -> int:
    """Return the most tokens of a micro-batch that the memory allows, a safety share left free.

    ``needed_bytes(tokens)`` is what micro-batches of that length still need; it must not fall with the length. Never more than a
    step holds, nor than pays.

    Raises:
        InputError: not even the longest pair fits.
    """
    usable = available * _USABLE.get(device, _USABLE["cpu"])
    if needed_bytes(longest_pair) > usable:
        raise InputError(
            f"the longest pair has {longest_pair} tokens and needs about {needed_bytes(longest_pair) / GIB:.1f} GiB beside what "
            f"is loaded, but {available / GIB:.1f} GiB are free: set gradient_checkpointing: true, lower max_length, take an "
            f"8-bit optimiser, LoRA or more GPUs with ZeRO-3, or try max_tokens_per_batch: {longest_pair} all the same"
        )
    fits, too_many = longest_pair, max(longest_pair, min(step_tokens, _LARGEST_BUDGET.get(device, 16_384))) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needed_bytes(middle) <= usable:
            fits = middle
        else:
            too_many = middle
    return fits
