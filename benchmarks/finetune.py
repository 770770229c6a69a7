"""Compares a preference fine-tuning step of this project with its peers, all in one run, turn by turn.

    python benchmarks/finetune.py --shape uc --out results.json --plot results.png

Writes one JSON file: machine, versions, settings, data, matmul, contenders (medians and repetitions), verification, ratios
(ours / peer in pairs per second), ratio_spread, peak_memory_ratio (ours / peer). See ``benchmarks/README.md``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import CONTENDERS, DEFAULT
from benchmarks.harness import Entry, Job, release_idle_memory
from benchmarks.matmul import NAME as MATMUL
from benchmarks.matmul import rates as matmul_rates
from benchmarks.report import OURS, add_ratios, loss_differences, plot, pool, rates, table
from benchmarks.shapes import MODELS, SHAPES, distinct_tokens, mean_flops, padded_tokens
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.files import atomic_file, write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program

if TYPE_CHECKING:
    from benchmarks.shapes import ModelSize, Plan

VERIFIED_STEPS = 2  # the short batch, twice: before and after one update
# Maximum differences from the first contender: log-probs (relative) and loss (as a share of the effect of the first update).
TOLERANCES = {"bf16": {"logps": 2e-3, "loss": 0.1}, "fp32": {"logps": 1e-5, "loss": 1e-3}}
CLOCKS = {"wall": "wall_seconds", "processor": "processor_seconds"}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def make_parser() -> Parser:
    parser = Parser(
        prog="finetune.py", description="Speed and memory of one preference fine-tuning step, against peers."
    )
    add = parser.add_argument
    add("--shape", default="uc", choices=sorted(SHAPES), help="lengths of prompts and responses")
    add("--model", default="28m", choices=list(MODELS), help="size of the model; weights are random")
    add(
        "--contenders",
        nargs="+",
        default=list(DEFAULT),
        help=f"any of {', '.join(n for n in CONTENDERS if n != MATMUL)}",
    )
    add("--reps", type=int, default=3, help="turns of each contender")
    add("--steps", type=int, default=1, help="optimiser steps per turn")
    add("--warmup", type=int, default=1, help="full-sized optimiser steps before the first turn")
    add("--epochs", type=float, default=3, help="epochs over which the single pass of the reference is spread")
    add("--batch_size", type=int, default=0, help="pairs per optimiser step (0: the shape's own)")
    add(
        "--precision",
        default="auto",
        choices=("auto", *TOLERANCES),
        help="bf16: autocast; auto: the faster one",
    )
    add("--weights", default="float32", choices=("float32", "bfloat16"), help="precision of the weights")
    add("--optimizer", default="adamw", choices=("adamw", "rmsprop"), help="optimiser of all contenders")
    add("--learning_rate", type=float, default=1e-5, help="large enough to see in the loss after one step")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--threads", type=int, default=1, help="CPU threads of a contender")
    add(
        "--clock",
        default="wall",
        choices=("wall", "processor"),
        help="processor: time on the CPU, for a shared machine",
    )
    add("--allocator", default="tuned", choices=("stock", "tuned"), help="tuned: glibc keeps freed memory (CPU)")
    add(
        "--schedule",
        default="interleaved",
        choices=("interleaved", "paired", "sequential"),
        help="interleaved: all turn by turn; paired: ours and one peer at a time (less memory); sequential: one by one",
    )
    add("--seed", type=int, default=0, help="seed of weights, lengths and ids")
    add("--out", required=True, help="JSON file to write")
    add("--plot", default=None, help="PNG file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before anything is loaded.

    Raises:
        InputError: a flag is out of range, or a contender is unknown or named twice.
    """
    for name, lowest in (("reps", 1), ("steps", 1), ("warmup", 0), ("batch_size", 0), ("threads", 1)):
        if getattr(options, name) < lowest:
            raise InputError(f"{name} is {getattr(options, name)}: set it to {lowest} or more")
    for name in ("epochs", "learning_rate"):
        if getattr(options, name) <= 0:
            raise InputError(f"{name} is {getattr(options, name)}: set it to a number above 0")
    if options.clock == "processor" and (options.threads > 1 or options.device == "cuda"):
        raise InputError(
            "clock is processor, which counts one CPU thread: set threads to 1 and device to cpu, or clock: wall"
        )
    valid = {name: contender for name, contender in CONTENDERS.items() if name != MATMUL}
    for name in options.contenders:
        lookup(valid, name, "contender")
    if len(set(options.contenders)) < len(options.contenders):
        raise InputError("contenders names one twice: name each once")


def resolve(options: Any) -> dict[str, float]:
    """Replace automatic choices by their values on this machine; return its rates of matrix products.

    The precision is the one with the faster matrix products.
    """
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() and options.clock == "wall" else "cpu"
    found = matmul_rates(MODELS[options.model], options.device, options.threads)
    if options.precision == "auto":
        options.precision = max(found, key=lambda precision: found[precision])
    options.batch_size = options.batch_size or SHAPES[options.shape].batch_size
    each = ", ".join(f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in found.items())
    say(f"matrix products: {each}; precision: {options.precision}")
    return found


def prepare(options: Any, folder: Path) -> tuple[Plan, ModelSize]:
    """Write the model and the pairs of the run into ``folder``; return the pairs and the model's size."""
    from benchmarks.shapes import ModelSize, make_model, make_plan

    shape, model_shape = SHAPES[options.shape], MODELS[options.model]
    measured = options.reps * options.steps
    plan = make_plan(shape, options.batch_size, options.warmup, measured, model_shape.vocab_size, options.seed)
    for grouped in (False, True):
        rows_file(folder, grouped).write_text(json.dumps(plan.pairs(grouped)), encoding="utf-8")
    model = make_model(model_shape, shape.max_length, options.seed, options.device, options.weights)
    model.save_pretrained(folder / "model")
    size = ModelSize.of(model)
    del model
    if options.device == "cuda":
        release_idle_memory("cuda")  # the contenders need it
    return plan, size


def rows_file(folder: Path, grouped: bool) -> Path:
    return folder / ("grouped.json" if grouped else "shuffled.json")


def make_job(name: str, options: Any, folder: Path, group: int) -> Job:
    """Return the job of one contender; ``group`` is the index of the group it takes turns with."""
    shared = (
        "device",
        "precision",
        "optimizer",
        "learning_rate",
        "batch_size",
        "reps",
        "steps",
        "allocator",
        "threads",
        "weights",
    )
    return Job(
        contender=name,
        model=options.model,
        folder=str(folder / str(group) / name),
        model_folder=str(folder / "model"),
        rows_file=str(rows_file(folder, CONTENDERS[name].grouped)),
        beta=0.1,
        max_length=SHAPES[options.shape].max_length,
        warmup_steps=VERIFIED_STEPS + options.warmup,
        **{key: getattr(options, key) for key in shared},
    )


def schedule(options: Any) -> list[list[str]]:
    """Return the groups of contenders that run at the same time and take turns with each other."""
    names = list(options.contenders)
    if options.schedule == "sequential":
        return [[name] for name in [MATMUL, *names]]
    peers = [name for name in names if name != OURS]
    if options.schedule == "paired" and OURS in names and peers:
        return [[MATMUL, OURS, peer] for peer in peers]
    return [[MATMUL, *names]]


def measure(options: Any, folder: Path) -> list[dict[str, Entry]]:
    """Let each group take its turns: the reference pass, the warm-up, the repetitions."""
    groups = []
    for number, names in enumerate(schedule(options)):
        entries = {name: Entry(make_job(name, options, folder, number)) for name in names}
        groups.append(entries)
        try:
            for name, entry in entries.items():
                say(f"preparing {name}")
                entry.start()
            for turn in range(2 + options.reps):
                for entry in entries.values():
                    entry.take_turn()
                say(f"turn {turn + 1} of {2 + options.reps} is complete ({', '.join(names)})")
            for entry in entries.values():
                entry.finish()
        finally:
            for entry in entries.values():
                entry.close()
        for name, entry in entries.items():
            if entry.error:
                say(f"{name} failed: {entry.error}")
    return groups


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def summarize(name: str, entry: Entry, plan: Plan, options: Any) -> dict[str, Any]:
    """Return the facts to report about one contender."""
    if entry.error:
        return {"label": CONTENDERS[name].label, "error": entry.error}
    tokens = [distinct_tokens(pair) for pair in plan.pairs(CONTENDERS[name].grouped)]
    head = (VERIFIED_STEPS + options.warmup) * options.batch_size
    size = options.steps * options.batch_size
    reference, _, *turns = entry.turns
    clock = CLOCKS[options.clock]
    timed = [
        {"seconds": turn[clock], "pairs": size, "tokens": sum(tokens[begin : begin + size])}
        for begin, turn in zip(range(head, len(tokens), size), turns, strict=True)
    ]
    cached = CONTENDERS[name].cached
    reference_rate = sum(tokens) / reference[clock] if cached else None
    per_pair = mean(distinct_tokens(pair) for pair in plan.shuffled[head:])  # one conversion for all
    each = rates(timed, per_pair, reference_rate, options.epochs)
    peak = max(turn["peak_bytes"] for turn in entry.turns)
    return {
        "label": CONTENDERS[name].label,
        **{key: median(values) for key, values in each.items()},
        "reference_tokens_per_second": reference_rate,
        "peak_bytes": peak,
        "baseline_bytes": entry.facts["baseline_bytes"],
        "peak_above_baseline_bytes": peak - entry.facts["baseline_bytes"],
        "processor_share": min(turn["processor_seconds"] / turn["wall_seconds"] for turn in turns),
        "turns": timed,
        "reps": each,
        "records": entry.facts["records"],
    }


def describe(options: Any, plan: Plan) -> dict[str, Any]:
    """Return machine, versions, settings and data of the run."""
    import torch

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "plot")}
    head = (VERIFIED_STEPS + options.warmup) * options.batch_size
    data: dict[str, Any] = {}
    for grouped, name in ((False, "shuffled"), (True, "grouped")):
        pairs = plan.pairs(grouped)[head:]
        batches = [pairs[begin : begin + options.batch_size] for begin in range(0, len(pairs), options.batch_size)]
        tokens = sum(map(distinct_tokens, pairs))
        data[name] = {
            "pairs": len(pairs),
            "distinct_tokens_per_pair": tokens / len(pairs),
            "padded_to_distinct": sum(map(padded_tokens, batches)) / tokens,
        }
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES if find_spec(name)},
        "settings": settings,
        "data": data,
    }


def cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    return names[0].split(":")[1].strip() if names else platform.machine()


def summarize_all(groups: list[dict[str, Entry]], plan: Plan, options: Any) -> dict[str, Any]:
    """Return the facts of each contender. One that took turns with several others is pooled; its facts from the turns with
    each of them are in the other's ``ours_beside``.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for entries in groups:
        facts = {name: summarize(name, entry, plan, options) for name, entry in entries.items() if name != MATMUL}
        for name, each in facts.items():
            found[name].append(each)
            if len(groups) > 1 and name != OURS and "error" not in facts.get(OURS, {"error": ""}):
                each["ours_beside"] = facts[OURS]
    return {name: pool(each) for name, each in found.items()}


def verify(result: dict[str, Any], groups: list[dict[str, Entry]], precision: str) -> None:
    """Add ``verification``: whether all contenders computed the same log-probs and the same losses."""
    records = {
        name: entry.facts["records"]
        for entries in groups
        for name, entry in entries.items()
        if name != MATMUL and not entry.error
    }
    limits = TOLERANCES[precision]
    differences = loss_differences(records, VERIFIED_STEPS) if records else {}
    agree = all(each[key] <= limit for each in differences.values() for key, limit in limits.items())
    result["verification"] = {"agree": agree, "tolerances": limits, "differences": differences}


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_signals()
    by_precision = resolve(options)
    with tempfile.TemporaryDirectory() as folder:
        plan, size = prepare(options, Path(folder))
        result = describe(options, plan)
        groups = measure(options, Path(folder))
    products = [entries[MATMUL] for entries in groups if MATMUL in entries]
    for entry in products:
        if entry.error:
            raise RuntimeError(entry.error)
    contenders = summarize_all(groups, plan, options)
    rate = median(turn["flops"] / turn[CLOCKS[options.clock]] for entry in products for turn in entry.turns)
    head = (VERIFIED_STEPS + options.warmup) * options.batch_size
    flops = mean_flops(size, plan.shuffled[head:], options.epochs)
    for facts in contenders.values():
        if "error" not in facts:
            facts["matmul_fraction"] = flops * facts["pairs_per_second"] / rate
    result |= {
        "matmul_flops_per_second": rate,
        "matmul_flops_by_precision": by_precision,
        "flops_per_pair": flops,
        "contenders": contenders,
    }
    verify(result, groups, options.precision)
    add_ratios(result)
    write_json_atomic(Path(options.out), result)
    print(table(result))
    if options.plot:
        with atomic_file(Path(options.plot)) as file:
            file.write(plot(result))
    return conclude(result)


def conclude(result: dict[str, Any]) -> int:
    """Print what the reader must know about the run; return the exit code: 1 if its numbers are not comparable."""
    rate, checked = result["matmul_flops_per_second"], result["verification"]
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; {result['flops_per_pair'] / 1e9:.0f} GFLOP per pair and epoch")
    for name, difference in checked["differences"].items():
        print(f"verified {name}: log-probs differ by {difference['logps']:.1e}, loss by {difference['loss']:.1e}")
    found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
    waited = [name for name, facts in found.items() if facts["processor_share"] < 0.9]
    if waited and result["settings"]["device"] == "cpu" and result["settings"]["clock"] == "wall":
        say(
            f"other programs used the processor during {', '.join(waited)}: use an idle machine, or set --clock processor"
        )
    if not checked["agree"]:
        say(f"the contenders do not compute the same values: limits {checked['tolerances']}")
    failed = OURS in result["contenders"] and OURS not in found
    return int(not checked["agree"] or failed)


if __name__ == "__main__":
    interrupt_on_signals()
    run_program(main)
