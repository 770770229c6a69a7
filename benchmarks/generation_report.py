"""Rates, ratios, the table and the plot of the generation benchmark, from its measured turns."""

from __future__ import annotations

import io
from statistics import median
from typing import Any

from benchmarks.report import BLUE, GREY, ratios

# ratio -> (ours, peer, goal)
RATIOS = {
    "vllm_vs_bare": ("vllm", "bare_vllm", 0.97),
    "transformers_vs_vllm": ("transformers", "bare_vllm", 1.0),
    "transformers_vs_original": ("transformers", "original", 2.0),
}
GATHER_GOAL = 20_000  # rows per second and core
FLAT_BYTES = 100 * 2**20  # maximum increase for ten times the rows
MIB = 2**20


def summarize(label: str, turns: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """Return the facts to report about a contender's measured turns; ``clock`` is the key of their seconds."""
    each = [turn["tokens"] / turn[clock] for turn in turns]
    kept = ("tokens", "wall_seconds", "processor_seconds")
    return {
        "label": label,
        "tokens_per_second": median(each),
        "tokens_per_response": sum(turn["tokens"] for turn in turns) / sum(len(turn["checksums"]) for turn in turns),
        "reps": {"tokens_per_second": each},
        "turns": [{name: turn[name] for name in kept} for turn in turns],
    }


def add_ratios(result: dict[str, Any]) -> None:
    """Add each ratio of tokens/s, the median over turns, and ``ratio_spread`` (minimum, maximum), if both contenders ran."""
    found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
    result["ratio_spread"] = {}
    for name, (ours, peer, _) in RATIOS.items():
        if ours in found and peer in found:
            speeds = [found[each]["reps"]["tokens_per_second"] for each in (ours, peer)]
            result[name], *result["ratio_spread"][name] = ratios(*speeds)


def same_responses(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Return the share of prompts that two contenders answered with the same ids."""
    same = total = 0
    for ours, theirs in zip(first, second, strict=True):
        total += len(ours["checksums"])
        same += sum(theirs["checksums"].get(prompt) == value for prompt, value in ours["checksums"].items())
    return same / total


def add_scale(result: dict[str, Any], scale: dict[int, dict[str, dict[str, float]]]) -> None:
    """Add ``scale`` (by number of rows), the rates at the most rows, and the increase of memory for ten times the rows."""
    if not scale:
        return
    few, many = min(scale), max(scale)
    result["scale"] = {str(rows): steps for rows, steps in scale.items()}
    for step in ("generate", "gather"):
        result[f"{step}_rows_per_s"] = scale[many][step]["rows_per_core_second"]
        peaks = [scale[rows][step]["peak_anonymous_bytes"] for rows in (few, many)]
        result[f"{step}_memory_growth_bytes"] = peaks[1] - peaks[0]


def add_goals(result: dict[str, Any]) -> None:
    """Add ``goals``: for everything that was measured, the goal, the value reached, and whether it meets the goal."""
    goals = {name: {"goal": goal, "reached": result[name]} for name, (_, _, goal) in RATIOS.items() if name in result}
    if "gather_rows_per_s" in result:
        goals["gather_rows_per_s"] = {"goal": GATHER_GOAL, "reached": result["gather_rows_per_s"]}
    result["goals"] = {name: facts | {"met": facts["reached"] >= facts["goal"]} for name, facts in goals.items()}
    for step in ("generate", "gather"):
        if (growth := result.get(f"{step}_memory_growth_bytes")) is not None:
            facts = {"goal": FLAT_BYTES, "reached": growth, "met": growth <= FLAT_BYTES}
            result["goals"][f"{step}_memory_growth_bytes"] = facts


def table(result: dict[str, Any]) -> str:
    """Return the tables that people read."""
    columns = "{:<32}{:>10}{:>16}{:>14}{:>14}"
    limit = "of the limit" if "limit" in result else ""
    lines = [columns.format("", "tokens/s", "from, to", "tokens each", limit)]
    for facts in result["contenders"].values():
        if "error" in facts:
            lines.append(f"{facts['label']:<32}  failed: {facts['error'].splitlines()[-1]}")
            continue
        each = facts["reps"]["tokens_per_second"]
        spread = f"{min(each):.0f}, {max(each):.0f}"
        share = f"{facts['limit_fraction']:.0%}" if "limit_fraction" in facts else ""
        each_response = f"{facts['tokens_per_response']:.1f}"
        lines.append(columns.format(facts["label"], f"{facts['tokens_per_second']:.0f}", spread, each_response, share))
    lines += [
        f"{name.replace('_', ' ')}: {result[name]:.3f} (from {low:.3f} to {high:.3f}; goal {RATIOS[name][2]:g})"
        for name, (low, high) in result["ratio_spread"].items()
    ]
    if "vllm_same_responses" in result:
        lines.append(f"same ids from both uses of vLLM: {result['vllm_same_responses']:.1%} of the responses")
    return "\n".join(lines + _scale_lines(result))


def _scale_lines(result: dict[str, Any]) -> list[str]:
    if "scale" not in result:
        return []
    columns = "{:<10}{:>10}{:>10}{:>17}{:>11}{:>18}"
    lines = ["", columns.format("", "rows", "rows/s", "rows/s and core", "peak MiB", "without files MiB")]
    for step in ("generate", "gather"):
        for rows, steps in result["scale"].items():
            facts = steps[step]
            rates = [f"{facts[name]:,.0f}" for name in ("rows_per_second", "rows_per_core_second")]
            peaks = [f"{facts[name] / MIB:.0f}" for name in ("peak_bytes", "peak_anonymous_bytes")]
            lines.append(columns.format(step, rows, *rates, *peaks))
    return lines


def plot(result: dict[str, Any]) -> bytes:
    """Return PNG bytes: tokens per second with the spread over turns; rows per second and memory of the steps at scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if "scale" in result else 1, squeeze=False)[0]
    _plot_speed(panels[0], result)
    if "scale" in result:
        _plot_memory(panels[1], result["scale"])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _plot_speed(axes: Any, result: dict[str, Any]) -> None:
    found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
    speeds = [facts["tokens_per_second"] for facts in found.values()]
    each = [facts["reps"]["tokens_per_second"] for facts in found.values()]
    errors = [
        [speed - min(some) for speed, some in zip(speeds, each, strict=True)],
        [max(some) - speed for speed, some in zip(speeds, each, strict=True)],
    ]
    against = {ours: f"  ({result[name]:.2f}x)" for name, (ours, _, _) in RATIOS.items() if name in result}
    colors = [BLUE if name in ("vllm", "transformers") else GREY for name in found]
    bars = axes.barh([facts["label"] for facts in found.values()], speeds, xerr=errors, color=colors, capsize=3)
    beside = [f"{speed:.0f}{against.get(name, '')}" for name, speed in zip(found, speeds, strict=True)]
    axes.bar_label(bars, beside, padding=6, fontsize=9)
    axes.set_title("Sampled tokens per second", fontsize=11, loc="left")
    axes.set_xlim(0, 1.4 * max(speeds, default=1))
    axes.invert_yaxis()


def _plot_memory(axes: Any, scale: dict[str, dict[str, dict[str, float]]]) -> None:
    names = [(step, rows) for step in ("generate", "gather") for rows in scale]
    peaks = [scale[rows][step]["peak_anonymous_bytes"] / MIB for step, rows in names]
    rates = [scale[rows][step]["rows_per_core_second"] for step, rows in names]
    bars = axes.barh([f"{step}, {int(rows):,} rows" for step, rows in names], peaks, color=BLUE)
    beside = [f"{peak:.0f}  ({rate:,.0f} rows/s and core)" for peak, rate in zip(peaks, rates, strict=True)]
    axes.bar_label(bars, beside, padding=4, fontsize=9)
    axes.set_title("Peak memory without pages of files (MiB)", fontsize=11, loc="left")
    axes.set_xlim(0, 2.1 * max(peaks))
    axes.invert_yaxis()
