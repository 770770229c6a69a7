"""The tables of docs/scale.md: plans of shipped configurations on 1, 8 and 64 GPUs. Called by scripts/make_docs.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import lookup
from spin.alignment.generation.leases import HEARTBEAT_INTERVAL
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.plan import memory_text, size_text, time_text
from spin.alignment.pipeline.planning import arithmetic
from spin.alignment.pipeline.planning.arithmetic import Lengths, ModelShape, shape_of
from spin.alignment.pipeline.planning.demands import GATHERED_PER_SECOND, Demand
from spin.alignment.pipeline.planning.devices import Fleet, find_gpu
from spin.alignment.pipeline.planning.stages import plan_stages, splits_of
from spin.alignment.pipeline.planning.workload import ASSUMED, ASSUMED_TEST, Split

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GPUS = (1, 8, 64)
PROMPTS = 50_000


@dataclass(frozen=True)
class Case:
    """A run of the page: its configuration, the sizes in the published config.json of its model, and the lengths of its rows."""

    config: str
    model: dict[str, Any]
    lengths: Lengths

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.model, self.config)


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
CASES = {
    "7b": Case(
        "zephyr_7b.yaml",
        {"model_type": "mistral", **dict(zip(_SIZES, (4096, 32, 32, 8, 14336, 32000), strict=True))},
        ASSUMED,
    ),
    # Half of what the configuration admits: 2,048 tokens of prompt and as many of a response.
    "70b": Case(
        "spin_70b.yaml",
        {"model_type": "llama", **dict(zip(_SIZES, (8192, 80, 64, 8, 28672, 128256), strict=True))},
        Lengths(prompt=1024, ground_truth=1024, response=1024),
    ),
}


@cache
def _plan(name: str, gpus: int) -> list[Demand]:
    case = lookup(CASES, name, "plan")
    config = load_run_config(CONFIGS / case.config, [f"--launch.config_file={CONFIGS / _launch_file(case)}"])
    train, *others = splits_of(config)
    splits = {train: Split(PROMPTS, case.lengths, "")} | {
        item: Split(ASSUMED_TEST, case.lengths, "") for item in others
    }
    fleet = Fleet(find_gpu("H100"), gpus, max(1, gpus // 8), gpus)
    return plan_stages(config, case.shape, splits, fleet)


def _launch_file(case: Case) -> str:
    launch = load_run_config(CONFIGS / case.config).launch
    return Path(launch.config_file or "").name


def plan_tables(name: str) -> str:
    """Return what the page shows of a plan: ``7b``, ``70b``, ``7b formulas`` or ``limits``."""
    if name == "limits":
        return _limits()
    case, _, part = name.partition(" ")
    return _formulas(case) if part == "formulas" else _stages(case)


def _stages(name: str) -> str:
    """Return the table of stages: the first iteration, a later one, which trains on the pairs of two, and the whole run."""
    plans = {gpus: {item.stage: item for item in _plan(name, gpus)} for gpus in GPUS}
    some = plans[GPUS[0]]
    wanted = ("sft/evaluate", "iter0/generate", "iter0/convert", "iter0/train", "iter1/train")
    lines = [["stage", "tokens", "FLOPs", "disk", *(f"{count} GPU{'s' if count > 1 else ''}" for count in GPUS)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for stage in (item for item in wanted if item in some):
        first = some[stage]
        tokens, flops = ("–" if value is None else f"{value:.2g}" for value in (first.tokens, first.flops))
        cells = [_cell(plans[gpus][stage]) for gpus in GPUS]
        lines.append([f"`{stage}`", tokens, flops, size_text(plans[GPUS[1]][stage].disk), *cells])
    every = {gpus: list(plan.values()) for gpus, plan in plans.items()}
    tokens, flops = (f"{sum(getattr(item, key) or 0 for item in every[1]):.2g}" for key in ("tokens", "flops"))
    disk = size_text(sum(item.disk for item in every[GPUS[1]]))
    lines.append(["**all stages**", tokens, flops, disk, *(_total(every[gpus]) for gpus in GPUS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(demand: Demand) -> str:
    """Return time and memory of a process, or that the stage does not fit."""
    if demand.memory is None:
        return time_text(demand.seconds)
    memory = memory_text(demand, demand.memory)
    return (
        f"**does not fit**: {memory}"
        if not demand.fits or demand.seconds is None
        else f"{time_text(demand.seconds)}, {memory}"
    )


def _total(demands: list[Demand]) -> str:
    if any(item.fits is False or item.seconds is None for item in demands):
        return "–"
    return time_text(sum(item.seconds or 0 for item in demands))


def _formulas(name: str) -> str:
    """Return the formulas of one iteration on 8 GPUs, with their numbers."""
    chosen = [item for item in _plan(name, 8) if item.stage in ("iter0/generate", "iter0/convert", "iter0/train")]
    return "\n".join(f"- `{item.stage}`: {line}" for item in chosen for line in item.formulas)


def _limits() -> str:
    """Return the table of what grows with rows, weights and workers besides the work of the GPUs."""
    lines = [["what", "formula", *CASES], ["---", "---", *["---:"] * len(CASES)]]
    rows: list[tuple[str, str, list[str]]] = [
        ("prompt store", "prompts x (prompt + ground truth) tokens x 4 B of text", []),
        ("reference store of two iterations", "pairs x (chosen + rejected) tokens x 4 B", []),
        ("checkpoint to resume from", "weights x (2 B + 4 B in float32 + 4 B per optimiser state)", []),
        ("gathering", f"rows / {GATHERED_PER_SECOND:,} per s, one core", []),
        ("heartbeats of 64 workers", f"64 / {HEARTBEAT_INTERVAL:g} s, a file written and renamed each time", []),
        ("cache of a sequence", "2 x layers x key-value width x 2 B x (prompt + response) tokens", []),
    ]
    for name, case in CASES.items():
        lengths, shape = case.lengths, case.shape
        states = 1 if name == "7b" else 2  # rmsprop, Adam
        values = (
            size_text(arithmetic.prompt_store_bytes(PROMPTS, lengths)),
            size_text(arithmetic.reference_bytes(2 * PROMPTS, lengths.ground_truth + lengths.response)),
            size_text(shape.weights * (6 + 4 * states)),
            time_text(PROMPTS / GATHERED_PER_SECOND),
            f"{64 / HEARTBEAT_INTERVAL:.1f} per s",
            size_text(shape.cache_numbers * 2 * (lengths.prompt + lengths.response)),
        )
        for row, value in zip(rows, values, strict=True):
            row[2].append(value)
    lines += [[what, formula, *values] for what, formula, values in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
