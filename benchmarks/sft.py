"""Compares a step of SFT of this project with TRL's SFTTrainer, all in one run, turn by turn.

    python benchmarks/sft.py --model 135m --out results.json

Writes one JSON file: machine, versions, settings, data, matmul, contenders (medians and repetitions), verification, ratios
(ours / peer in tokens per second), ratio_spread, peak_memory_ratio (ours / peer). See ``benchmarks/README.md``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.finetune import CLOCKS, PACKAGES, cpu_name, say
from benchmarks.harness import Entry, Job
from benchmarks.matmul import NAME as MATMUL
from benchmarks.matmul import rates as matmul_rates
from benchmarks.report import OURS, add_ratios
from benchmarks.sft_contenders import SFT_CONTENDERS
from benchmarks.sft_report import loss_differences, table
from benchmarks.sft_shapes import MAX_LENGTH, SFTPlan, flops_per_row, make_sft_plan, padded_to_distinct
from benchmarks.shapes import MODELS, ModelSize, make_model
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program

VERIFIED_STEPS = 2  # the short batch, twice: before and after one update
# Largest differences from the first contender: the loss (relative), and the loss after an update as a share of its effect.
TOLERANCES = {"bf16": {"loss": 2e-3, "gain": 0.1}, "fp32": {"loss": 1e-5, "gain": 1e-3}}
RATE = "tokens_per_second"


def make_parser() -> Parser:
    parser = Parser(prog="sft.py", description="Speed and memory of one step of SFT, against TRL.")
    add = parser.add_argument
    names = [name for name in SFT_CONTENDERS if name != MATMUL]
    add("--model", default="135m", choices=list(MODELS), help="size of the model; weights are random")
    add("--contenders", nargs="+", default=names, help=f"any of {', '.join(names)}")
    add("--reps", type=int, default=3, help="turns of each contender")
    add("--steps", type=int, default=1, help="optimiser steps per turn")
    add("--warmup", type=int, default=1, help="full-sized optimiser steps before the first turn")
    add("--batch_size", type=int, default=8, help="rows per optimiser step")
    add("--precision", default="bf16", choices=tuple(TOLERANCES), help="bf16: autocast, as TRL's default")
    add("--learning_rate", type=float, default=1e-5, help="large enough to see in the loss after one step")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    add("--threads", type=int, default=1, help="CPU threads of a contender")
    add("--clock", default="wall", choices=tuple(CLOCKS), help="processor: time on the CPU, for a shared machine")
    add("--allocator", default="tuned", choices=("stock", "tuned"), help="tuned: glibc keeps freed memory (CPU)")
    add("--schedule", default="paired", choices=("interleaved", "paired"), help="paired: ours and one peer at a time")
    add("--seed", type=int, default=0, help="seed of weights, lengths and ids")
    add("--out", required=True, help="JSON file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before anything is loaded.

    Raises:
        InputError: a flag is out of range, or a contender is unknown or named twice.
    """
    for name, lowest in (("reps", 1), ("steps", 1), ("warmup", 0), ("batch_size", 1), ("threads", 1)):
        if getattr(options, name) < lowest:
            raise InputError(f"{name} is {getattr(options, name)}: set it to {lowest} or more")
    if options.learning_rate <= 0:
        raise InputError(f"learning_rate is {options.learning_rate}: set it to a number above 0")
    if options.clock == "processor" and (options.threads > 1 or options.device == "cuda"):
        raise InputError(
            "clock is processor, which counts one CPU thread: set threads to 1 and device to cpu, or clock: wall"
        )
    for name in options.contenders:
        lookup({name: item for name, item in SFT_CONTENDERS.items() if name != MATMUL}, name, "contender")
    if len(set(options.contenders)) < len(options.contenders):
        raise InputError("contenders names one twice: name each once")


def prepare(options: Any, folder: Path) -> tuple[SFTPlan, ModelSize]:
    """Write the model and the rows of the run into ``folder``; return the rows and the model's size."""
    shape = MODELS[options.model]
    measured = options.reps * options.steps
    plan = make_sft_plan(options.batch_size, options.warmup, measured, shape.vocab_size, options.seed)
    for grouped in (False, True):
        (folder / f"grouped-{grouped}.json").write_text(json.dumps(plan.rows(grouped)), encoding="utf-8")
    model = make_model(shape, MAX_LENGTH, options.seed)
    model.save_pretrained(folder / "model")
    return plan, ModelSize.of(model)


def make_job(name: str, options: Any, folder: Path, group: int) -> Job:
    """Return the job of one contender; ``group`` is the index of the group it takes turns with."""
    shared = ("device", "precision", "learning_rate", "batch_size", "reps", "steps", "allocator", "threads", "model")
    return Job(
        contender=name,
        benchmark="sft",
        folder=str(folder / str(group) / name),
        model_folder=str(folder / "model"),
        rows_file=str(folder / f"grouped-{SFT_CONTENDERS[name].grouped}.json"),
        optimizer="adamw",
        beta=0.0,
        max_length=MAX_LENGTH,
        warmup_steps=VERIFIED_STEPS + options.warmup,
        **{key: getattr(options, key) for key in shared},
    )


def schedule(options: Any) -> list[list[str]]:
    """Return the groups of contenders that run at the same time and take turns with each other."""
    peers = [name for name in options.contenders if name != OURS]
    if options.schedule == "paired" and OURS in options.contenders and peers:
        return [[MATMUL, OURS, peer] for peer in peers]
    return [[MATMUL, *options.contenders]]


def measure(options: Any, folder: Path) -> list[dict[str, Entry]]:
    """Let each group take its turns: the warm-up, then the repetitions."""
    groups = []
    for number, names in enumerate(schedule(options)):
        entries = {name: Entry(make_job(name, options, folder, number)) for name in names}
        groups.append(entries)
        try:
            for entry in entries.values():
                entry.start()
            for turn in range(1 + options.reps):
                for entry in entries.values():
                    entry.take_turn()
                say(f"turn {turn + 1} of {1 + options.reps} is complete ({', '.join(names)})")
            for entry in entries.values():
                entry.finish()
        finally:
            for entry in entries.values():
                entry.close()
        for name, entry in entries.items():
            if entry.error:
                say(f"{name} failed: {entry.error}")
    return groups


def summarize(name: str, entry: Entry, plan: SFTPlan, options: Any) -> dict[str, Any]:
    """Return the facts to report about one contender."""
    if entry.error:
        return {"label": SFT_CONTENDERS[name].label, "error": entry.error}
    size = options.steps * options.batch_size
    rows = plan.rows(SFT_CONTENDERS[name].grouped)[plan.head :]
    _, *turns = entry.turns
    timed = [
        {"seconds": turn[CLOCKS[options.clock]], "tokens": sum(len(ids) for row in some for ids in row.values())}
        for turn, some in zip(turns, (rows[begin : begin + size] for begin in range(0, len(rows), size)), strict=True)
    ]
    each = [turn["tokens"] / turn["seconds"] for turn in timed]
    peak = max(turn["peak_bytes"] for turn in entry.turns)
    return {
        "label": SFT_CONTENDERS[name].label,
        RATE: median(each),
        "peak_bytes": peak,
        "baseline_bytes": entry.facts["baseline_bytes"],
        "peak_above_baseline_bytes": peak - entry.facts["baseline_bytes"],
        "processor_share": min(turn["processor_seconds"] / turn["wall_seconds"] for turn in turns),
        "turns": timed,
        "reps": {RATE: each},
        "records": entry.facts["records"],
    }


def summarize_all(groups: list[dict[str, Entry]], plan: SFTPlan, options: Any) -> dict[str, Any]:
    """Return the facts of each contender; ours from its turns with each peer is in the peer's ``ours_beside``."""
    found: dict[str, Any] = {}
    ours = []
    for entries in groups:
        facts = {name: summarize(name, entry, plan, options) for name, entry in entries.items() if name != MATMUL}
        if OURS in facts:
            ours.append(facts[OURS])
        for name, each in facts.items():
            if name != OURS and "error" not in facts.get(OURS, {"error": ""}):
                each["ours_beside"] = facts[OURS]
        found |= facts
    worked = [facts for facts in ours if "error" not in facts]
    if worked:
        reps = [value for facts in worked for value in facts["reps"][RATE]]
        highest = max(worked, key=lambda facts: facts["peak_bytes"])
        found[OURS] = highest | {RATE: median(reps), "reps": {RATE: reps}}
    return {name: found[name] for name in options.contenders}


def verify(groups: list[dict[str, Entry]], precision: str) -> dict[str, Any]:
    """Return whether all contenders computed the same loss before and after an update."""
    records = {
        name: entry.facts["records"]
        for entries in groups
        for name, entry in entries.items()
        if name != MATMUL and not entry.error
    }
    limits = TOLERANCES[precision]
    differences = loss_differences(records, VERIFIED_STEPS) if records else {}
    agree = all(each[key] <= limit for each in differences.values() for key, limit in limits.items())
    return {"agree": agree, "tolerances": limits, "differences": differences}


def describe(options: Any, plan: SFTPlan) -> dict[str, Any]:
    """Return machine, versions, settings and data of the run."""
    import torch

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    data = {}
    for grouped, name in ((False, "shuffled"), (True, "grouped")):
        rows = plan.rows(grouped)[plan.head :]
        tokens = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
        data[name] = {
            "rows": len(rows),
            "tokens_per_row": sum(tokens) / len(tokens),
            "response_share": sum(len(row["response_ids"]) for row in rows) / sum(tokens),
            "padded_to_distinct": padded_to_distinct(tokens, options.batch_size),
        }
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "system": platform.platform(),
            "load_average_at_start": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "settings": settings,
        "data": data,
    }


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_signals()
    by_precision = matmul_rates(MODELS[options.model], options.device, options.threads)
    say("matrix products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in by_precision.items()))
    with tempfile.TemporaryDirectory() as folder:
        plan, size = prepare(options, Path(folder))
        result = describe(options, plan)
        groups = measure(options, Path(folder))
    products = [entry for entries in groups if not (entry := entries[MATMUL]).error]
    rate = median(turn["flops"] / turn[CLOCKS[options.clock]] for entry in products for turn in entry.turns)
    contenders = summarize_all(groups, plan, options)
    flops = flops_per_row(size, plan.shuffled[plan.head :])
    per_row = result["data"]["shuffled"]["tokens_per_row"]
    for facts in contenders.values():
        if "error" not in facts:
            facts["matmul_fraction"] = flops * facts[RATE] / per_row / rate
    result |= {
        "matmul_flops_per_second": rate,
        "matmul_flops_by_precision": by_precision,
        "flops_per_row": flops,
        "contenders": contenders,
        "verification": verify(groups, options.precision),
    }
    add_ratios(result, RATE)
    write_json_atomic(Path(options.out), result)
    print(table(result))
    failed = [name for name, facts in contenders.items() if "error" in facts]
    if not result["verification"]["agree"]:
        say(f"the contenders disagree: {result['verification']}")
    return 1 if failed or not result["verification"]["agree"] else 0


if __name__ == "__main__":
    run_program(main)
