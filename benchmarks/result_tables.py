"""The tables of results in README and docs, made from the files in benchmarks/results. Called by scripts/make_docs.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.report import GIB
from spin.alignment.core.errors import lookup
from spin.alignment.core.files import read_json
from spin.alignment.evaluation.statistics import Z95, wilson
from spin.alignment.report.table import with_groups

RESULTS = Path(__file__).parent / "results"
# (heading, key, format); a column without any value is left out.
COLUMNS = (
    ("exact, greedy", "greedy_exact", "{:.3f}"),
    ("exact, T=1", "sampled_exact", "{:.3f}"),
    ("exact, T=0.5", "sampled_exact_t05", "{:.3f}"),
    ("NLL", "nll", "{:.3f}"),
    ("identical", "identical_rate", "{:.1%}"),
    ("reward accuracy", "reward_accuracy", "{:.3f}"),
    ("margin", "margin", "{:.2f}"),
    ("chosen drift", "chosen_drift", "{:+.2f}"),
    ("length", "mean_length", "{:.1f}"),
)
# The parts of the fault suite that are not one program.
FAULT_PARTS = {
    "spin-run-offline": "`spin run`, offline",
    "spin-run-online": "`spin run`, online",
    "spin-run-weights": "`spin run`, token weights",
    "writers": "`generate`, 64 processes on one folder",
}
VARIANTS = ("unshared", "unfused", "padded", "uncached")  # of this project: no peers
SHARES = ("greedy_exact", "sampled_exact", "sampled_exact_t05")
# The rows of each table: (entry of demos.json, model, label).
TABLES = {
    "demo": (
        ("demo", "sft", "SFT start"),
        ("demo", "sft_continued", "continued SFT (control, same number of sequences)"),
        *(("demo", f"iter{number}", f"SPIN iteration {number}") for number in range(3)),
    ),
    "sorting": (
        ("online", "sft", "SFT start"),
        ("online", "sft_continued", "continued SFT (control)"),
        ("online", "online", "**online DPO**, 120 steps"),
        *(("sppo", f"iter{number}", f"SPPO iteration {number}") for number in range(3)),
        ("sppo", "iter3", "**SPPO iteration 3**"),
    ),
    "plenty": (
        ("online, 6000 answered rows", "sft", "SFT start"),
        ("online, 6000 answered rows", "sft_continued", "continued SFT (control)"),
        ("online, 6000 answered rows", "online", "online DPO"),
    ),
    "weights": (
        ("wspin", "sft", "SFT start"),
        ("wspin", "sft_continued", "continued SFT (control)"),
        ("wspin", "iter0_spin", "SPIN"),
        ("wspin", "iter0", "WSPIN"),
    ),
}

# The rows of the table of the chat demo, which has columns of its own: (model, label).
CHAT = (
    ("sft", "SmolLM2-135M-Instruct"),
    ("sft_continued", "rejection sampling: SFT on its accepted responses (control)"),
    ("online", "**online DPO**"),
)
CHAT_SAMPLING = (("greedy", "greedy_exact"), ("T=1", "sampled_exact"), ("T=0.5", "sampled_exact_t05"))
# (label, model, the model that it is compared with).
CHAT_COMPARISONS = (
    ("online DPO against the start", "online", "against_start"),
    ("online DPO against rejection sampling", "online", "against_control"),
    ("rejection sampling against the start", "sft_continued", "against_start"),
)


@cache
def demos() -> dict[str, Any]:
    """Return the committed results of the demos."""
    return read_json(RESULTS / "demos.json")


def rows_of(entry: str, model: str) -> list[dict[str, Any]]:
    """Return the rows of a model, one per seed that has it."""
    seeds = lookup(demos(), entry, "entry of demos.json")["seeds"]
    return [with_groups(row) for rows in seeds.values() for row in rows if row["model"] == model]


def half_width(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return half of the 95 % interval of the mean over seeds of ``key``; None if a seed has no interval.

    Every seed has its own model and responses, so their errors add up as independent ones. The interval of a share of the
    held-out prompts follows from their number.
    """
    halves = []
    for row in rows:
        interval = row.get(f"{key}_interval")
        if interval is None and key in SHARES:
            interval = wilson(round(row[key] * row["n"]), row["n"])
        if interval is None:
            return None
        halves.append((interval[1] - interval[0]) / 2)
    return math.hypot(*halves) / len(halves)


def cell(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Return ``mean ±half (lowest to highest seed)``; a dash without values."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return "–"
    values = [row[key] for row in rows]
    half = half_width(rows, key)
    text = form.format(sum(values) / len(values)) + ("" if half is None else f" ±{form.replace('+', '').format(half)}")
    low, high = form.format(min(values)), form.format(max(values))
    return text + (f" ({low} to {high})" if low != high else "")


def compared(rows: Sequence[dict[str, Any]], key: str) -> str:
    """Return in how many seeds a model is clearly better or worse than the SFT start on the same prompts; a dash if unknown."""
    found = [row["against_start"][key] for row in rows if key in row.get("against_start", {})]
    if not found:
        return "–"
    better = sum(item["p_value"] < 0.05 and item["difference"] > 0 for item in found)
    worse = sum(item["p_value"] < 0.05 and item["difference"] < 0 for item in found)
    return f"better in {better}, worse in {worse} of {len(found)}"


def paired(rows: Sequence[dict[str, Any]], against: str, key: str) -> str:
    """Return the mean over seeds of a paired difference, ± half of its 95 % interval, and in how many seeds it is clear; a dash
    if it is unknown.

    Args:
        against: ``against_start`` or ``against_control``.
    """
    found = [row[against][key] for row in rows if key in row.get(against, {})]
    if not found:
        return "–"
    half = Z95 * math.hypot(*(item["se"] for item in found)) / len(found)
    clear = sum(item["p_value"] < 0.05 for item in found)
    return (
        f"{sum(item['difference'] for item in found) / len(found):+.3f} ±{half:.3f} (clear in {clear} of {len(found)})"
    )


def chat_table() -> str:
    """Return the two tables of the chat demo: shares of instructions followed, and the paired differences on the same prompts."""
    models = [(label, rows_of("chat", model)) for model, label in CHAT]
    shares = {f"prompts, {how}": f"{key}/held-out prompts" for how, key in CHAT_SAMPLING} | {
        f"kinds, {how}": f"{key}/held-out kinds" for how, key in CHAT_SAMPLING[:2]
    }
    lines = [
        [
            label,
            *(cell(rows, key, "{:.3f}") for key in shares.values()),
            cell(rows, "mean_length", "{:.1f}"),
            cell(rows, "truncation_rate", "{:.3f}"),
        ]
        for label, rows in models
    ]
    tested = {heading: key for heading, key in shares.items() if "T=0.5" not in heading}
    differences = [
        [label, *(paired(rows_of("chat", model), against, key) for key in tested.values())]
        for label, model, against in CHAT_COMPARISONS
    ]
    first = markdown_table(["model", *shares, "tokens", "cut off"], lines)
    return "\n\n".join((first, markdown_table(["paired difference", *tested], differences), caption(["chat"])))


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *lines))


def results_table(name: str) -> str:
    """Return a table of :data:`TABLES` with its caption: measures by model, over the seeds."""
    if name == "chat":
        return chat_table()
    models = lookup(TABLES, name, "table of results")
    found = [(label, rows_of(entry, model)) for entry, model, label in models]
    columns = [item for item in COLUMNS if any(row.get(item[1]) is not None for _, rows in found for row in rows)]
    headings = ["model", *(heading for heading, _, _ in columns)]
    lines = [[label, *(cell(rows, key, form) for _, key, form in columns)] for label, rows in found]
    for key, heading in (("greedy_exact", "greedy, paired with the start"), ("sampled_exact", "T=1, paired")):
        if any("against_start" in row for _, rows in found for row in rows):
            headings.append(heading)
            lines = [[*line, compared(rows, key)] for line, (_, rows) in zip(lines, found, strict=True)]
    body = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body) + "\n\n" + caption([item[0] for item in models])


def caption(entries: Sequence[str]) -> str:
    """Return what the numbers of a table are: seeds, prompts, machine, and the meaning of ±."""
    facts = []
    for entry in dict.fromkeys(entries):
        found = demos()[entry]
        counts = sorted({row["n"] for rows in found["seeds"].values() for row in rows})
        prompts = " or ".join(str(count) for count in counts)
        facts.append(f"{entry}: seeds {', '.join(found['seeds'])}, {prompts} held-out prompts each, {found['machine']}")
    return (
        f"Mean over seeds ± half of its 95 % interval over held-out prompts (lowest to highest seed). {'; '.join(facts)}. "
        "A number without ± was measured before its error was recorded."
    )


def value(entry: str, model: str, key: str) -> str:
    """Return the mean over seeds of one measure, for a sentence."""
    rows = rows_of(entry, model)
    return f"{sum(row[key] for row in rows) / len(rows):.2f}"


def speed_table(name: str) -> str:
    """Return the full table of a fine-tuning benchmark: medians over turns, and each ratio with its smallest and largest turn."""
    result = read_json(RESULTS / f"{name}.json")
    epochs = f"pairs/s, {result['settings']['epochs']:g} epochs"
    headings = ["", "pairs/s, step", epochs, "tokens/s", "peak GiB", "of the matmul rate", "ours is faster by (spread)"]
    lines = [[*headings, "ours / its memory"], ["---"] * 8]
    for contender, facts in result["contenders"].items():
        label = CONTENDERS[contender].label
        if "error" in facts:
            lines.append([label, "failed", *[""] * 6])
            continue
        ratio = result["ratios"].get(contender)
        low, high = result["ratio_spread"].get(contender, (0, 0))
        lines.append(
            [
                f"**{label}**" if ratio is None else label,
                f"{facts['step_pairs_per_second']:.3f}",
                f"{facts['pairs_per_second']:.3f}",
                f"{facts['tokens_per_second']:.0f}",
                f"{facts['peak_bytes'] / GIB:.2f}",
                f"{facts['matmul_fraction']:.0%}",
                "–" if ratio is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
                "–" if ratio is None else f"{result['peak_memory_ratio'][contender]:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sft_table(name: str) -> str:
    """Return the table of an SFT benchmark: medians over turns, and each ratio with its smallest and largest turn."""
    result = read_json(RESULTS / f"{name}.json")
    lines = [
        "| | tokens/s | peak GiB | of the matmul rate | ours is faster by (spread) | ours / its memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for contender, facts in result["contenders"].items():
        if "error" in facts:
            lines.append(f"| {facts['label']} | failed | | | | |")
            continue
        ratio, (low, high) = result["ratios"].get(contender), result["ratio_spread"].get(contender, (0, 0))
        cells = [
            f"**{facts['label']}**" if ratio is None else facts["label"],
            f"{facts['tokens_per_second']:.0f}",
            f"{facts['peak_bytes'] / GIB:.2f}",
            f"{facts['matmul_fraction']:.0%}",
            "–" if ratio is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            "–" if ratio is None else f"{result['peak_memory_ratio'][contender]:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generation_table(name: str) -> str:
    """Return the table of a generation benchmark (medians over turns), and the ratios of adjacent turns that it has."""
    result = read_json(RESULTS / f"{name}.json")
    lines = [["", "tokens/s", "from, to"], ["---"] * 3]
    for facts in result["contenders"].values():
        turns = facts["reps"]["tokens_per_second"]
        lines.append([facts["label"], f"{facts['tokens_per_second']:.0f}", f"{min(turns):.0f}, {max(turns):.0f}"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sentences = []
    for key, words in (
        ("vllm_vs_bare", "ours on vLLM compared with the engine alone"),
        ("transformers_vs_original", "ours on transformers compared with the original's loop"),
    ):
        if key not in result:
            continue
        low, high = result["ratio_spread"][key]
        goal = result["goals"][key]["goal"]
        sentences.append(f"{words}: **{result[key]:.2f}x** ({low:.2f} to {high:.2f}; goal {goal:g})")
    same = f"{result['vllm_same_responses']:.0%} of the responses on vLLM have the engine's ids"
    return f"{table}\n\nTurn by turn, {'; '.join(sentences)}. {same}."


def decoding_table(*names: str) -> str:
    """Return the table of generation benchmarks with a chat model (``--model``), and the ratio of adjacent turns."""
    lines = [
        ["precision, threads", "", "tokens/s", "from, to", "of the limit", "ours / the engine (spread)"],
        ["---"] * 6,
    ]
    for name in names:
        result = read_json(RESULTS / f"{name}.json")
        settings = result["settings"]
        low, high = result["ratio_spread"]["transformers_vs_vllm"]
        for contender, facts in result["contenders"].items():
            turns = facts["reps"]["tokens_per_second"]
            ratio = f"**{result['transformers_vs_vllm']:.2f}** ({low:.2f} to {high:.2f})"
            lines.append(
                [
                    f"{settings['dtype']}, {settings['threads']}",
                    facts["label"],
                    f"{facts['tokens_per_second']:.0f}",
                    f"{min(turns):.0f}, {max(turns):.0f}",
                    f"{facts['limit_fraction']:.0%}" if "limit_fraction" in facts else "–",
                    ratio if contender == "transformers" else "–",
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scale_table(name: str) -> str:
    """Return the table of a generation benchmark without a model, by step and number of rows."""
    result = read_json(RESULTS / f"{name}.json")
    headings = ["step", "rows", "rows/s, wall time", "rows/s, processor time", "peak memory without mapped files"]
    lines = [headings, ["---"] * len(headings)]
    steps = {"generate": "generate: store, claim, decode, write, merge", "gather": "gather: check, prove, write"}
    for step, label in steps.items():
        for rows, measured in result["scale"].items():
            facts = measured[step]
            rates = [f"{facts[key]:,.0f}" for key in ("rows_per_second", "rows_per_core_second")]
            lines.append([label, f"{int(rows):,}", *rates, f"{facts['peak_anonymous_bytes'] / 2**20:.0f} MiB"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bookkeeping_table(*names: str) -> str:
    """Return the table of what generation does besides the engine: microseconds of processor time per row, a column per run."""
    results = [read_json(RESULTS / f"{name}.json") for name in names]
    models = [result["settings"]["model"] or "whole words" for result in results]
    lines = [["microseconds of processor time per row", *models], ["---"] * (len(results) + 1)]
    for stage in results[0]["stages"]:
        lines.append([stage, *(f"{result['stages'][stage]['microseconds']:.0f}" for result in results)])
    for label, key in (
        ("all: rows/s, processor time", "rows_per_core_second"),
        ("all: rows/s, wall time", "rows_per_second"),
    ):
        lines.append([f"**{label}**", *(f"**{result['all'][key]:,.0f}**" for result in results)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def start_table(name: str) -> str:
    """Return the table of the benchmark of training starts: a line for each case, cold and warm."""
    headings = ["case", "store", "seconds to the first step", "own memory of a process", "memory of all processes"]
    lines = [headings, ["---", "---", "---:", "---:", "---:"]]
    for case, kinds in read_json(RESULTS / f"{name}.json")["cases"].items():
        for kind, facts in kinds.items():
            own = max(peak["anonymous"] for peak in facts["memory_of_processes"])
            seconds = f"{facts['seconds_to_first_step']:.0f}"
            lines.append([case, kind, seconds, f"{own:,.0f} MiB", f"{facts['memory_of_all']:,.0f} MiB"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def faults_table(name: str) -> str:
    """Return how many faults of each kind the long form of the fault suite has injected, and how many were not survived."""
    kinds = {
        "file operations": "file operations",
        "kills": "kill",
        "full disk": "full",
        "small disk": "small disk",
        "flipped bits": "bit flip",
    }
    lines = [["what was disturbed", *kinds, "signals", "faults", "of planned", "failures"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for part, result in read_json(RESULTS / f"{name}.json")["parts"].items():
        counts = result["counts"]
        signals = sum(count for how, count in counts.items() if " to " in how)
        numbers = [*(counts.get(how, 0) for how in kinds.values()), signals, result["done"], result["planned"]]
        lines.append([FAULT_PARTS.get(part, f"`{part}`"), *(f"{n:,}" for n in (*numbers, len(result["failures"])))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratios_table(*names: str) -> str:
    """Return how much faster than each peer the project is, by benchmark, with the smallest and largest turn, and its memory."""
    results = [read_json(RESULTS / f"{name}.json") for name in names]
    headings = ["compared with"]
    for result in results:
        shape = result["settings"]["shape"]
        headings += [f"faster by ({shape})", f"memory relative to it ({shape})"]
    lines = [headings, ["---"] * len(headings)]
    for contender in results[0]["ratios"]:
        if contender in VARIANTS:
            continue
        line = [CONTENDERS[contender].label]
        for result in results:
            low, high = result["ratio_spread"][contender]
            line += [
                f"{result['ratios'][contender]:.1f}x ({low:.1f} to {high:.1f})",
                f"{result['peak_memory_ratio'][contender]:.0%}",
            ]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
