"""Rates, ratios, the table and the plot of the fine-tuning benchmark, from its measured turns."""

from __future__ import annotations

import io
from statistics import median
from typing import Any

from benchmarks.contenders import CONTENDERS

GIB = 2**30
OURS = "ours"
BLUE, GREY = "#2563eb", "#9ca3af"


def rates(turns: list[dict[str, float]], tokens_per_pair: float, reference_rate: float | None, epochs: float) -> Any:
    """Return one contender's rates, one value per repetition.

    ``turns`` contain seconds and distinct tokens. ``reference_rate`` is the rate of the reference pass in tokens/s, or None if
    there is none. Rates in pairs are rates in tokens divided by the mean tokens of a pair, so that repetitions with longer
    pairs are comparable.

    * tokens_per_second, step_pairs_per_second: training steps only;
    * pairs_per_second: pairs trained per second over ``epochs`` epochs, including one reference pass.
    """
    tokens = [turn["tokens"] / turn["seconds"] for turn in turns]
    reference = 0.0 if reference_rate is None else 1 / (epochs * reference_rate)
    return {
        "tokens_per_second": tokens,
        "step_pairs_per_second": [rate / tokens_per_pair for rate in tokens],
        "pairs_per_second": [1 / (1 / rate + reference) / tokens_per_pair for rate in tokens],
    }


def ratios(ours: list[float], peer: list[float]) -> tuple[float, float, float]:
    """Return the median, minimum and maximum of the ratio ours / peer over the repetitions."""
    each = [first / second for first, second in zip(ours, peer, strict=True)]
    return median(each), min(each), max(each)


def pool(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of a contender that was measured several times: medians over all repetitions, the maximum peak."""
    worked = [facts for facts in each if "error" not in facts]
    if len(each) == 1 or not worked:
        return each[0]
    reps = {key: [value for facts in worked for value in facts["reps"][key]] for key in worked[0]["reps"]}
    highest = max(worked, key=lambda facts: facts["peak_bytes"])
    rates_of_reference = [facts["reference_tokens_per_second"] for facts in worked]
    return highest | {
        **{key: median(values) for key, values in reps.items()},
        "reference_tokens_per_second": None if None in rates_of_reference else median(rates_of_reference),
        "processor_share": min(facts["processor_share"] for facts in worked),
        "turns": [turn for facts in worked for turn in facts["turns"]],
        "reps": reps,
    }


def add_ratios(result: dict[str, Any], rate: str = "pairs_per_second") -> None:
    """Add ``ratios`` (ours / peer in ``rate``), ``ratio_spread`` (minimum, maximum) and, as ours / peer too,
    ``peak_memory_ratio`` and ``peak_above_baseline_ratio``.
    """
    found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
    result |= {"ratios": {}, "ratio_spread": {}, "peak_memory_ratio": {}, "peak_above_baseline_ratio": {}}
    if OURS not in found:
        return
    for name, facts in found.items():
        if name == OURS:
            continue
        ours = facts.get("ours_beside", found[OURS])
        middle, *spread = ratios(ours["reps"][rate], facts["reps"][rate])
        result["ratios"][name] = middle
        result["ratio_spread"][name] = spread
        result["peak_memory_ratio"][name] = ours["peak_bytes"] / facts["peak_bytes"]
        above = "peak_above_baseline_bytes"
        result["peak_above_baseline_ratio"][name] = ours[above] / facts[above]


def loss_differences(records: dict[str, list[dict[str, float]]], verified: int) -> dict[str, dict[str, float]]:
    """Return how much each contender differs from the first one in the verified steps.

    * logps: relative difference of the summed log-probs of the responses before the first update;
    * loss: difference of the loss after the first update on the same batch, relative to the decrease caused by that update.
    """
    first, *_ = records.values()
    gain = abs(first[0]["loss"] - first[verified - 1]["loss"])
    return {
        name: {
            "logps": max(abs(found[0][key] / first[0][key] - 1) for key in ("chosen", "rejected")),
            "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(found[:verified], first, strict=False)) / gain,
        }
        for name, found in records.items()
    }


def table(result: dict[str, Any]) -> str:
    """Return the table that people read."""
    columns = "{:<28}{:>9}{:>10}{:>10}{:>7}{:>12}{:>9}{:>8}  {}"
    epochs = f"{result['settings']['epochs']:g} epochs"
    lines = [
        columns.format("", "pairs/s", "pairs/s", "distinct", "peak", "above base", "of the", "ours", "from, to"),
        columns.format("", "step", epochs, "tokens/s", "GiB", "GiB", "matmuls", "faster", ""),
    ]
    for name, facts in result["contenders"].items():
        label = CONTENDERS[name].label
        if "error" in facts:
            lines.append(f"{label:<28}  failed: {facts['error'].splitlines()[0]}")
            continue
        numbers = [
            label,
            f"{facts['step_pairs_per_second']:.3f}",
            f"{facts['pairs_per_second']:.3f}",
            f"{facts['tokens_per_second']:.0f}",
            f"{facts['peak_bytes'] / GIB:.2f}",
            f"{facts['peak_above_baseline_bytes'] / GIB:.2f}",
            f"{facts['matmul_fraction']:.0%}",
        ]
        ratio = result["ratios"].get(name)
        low, high = result["ratio_spread"].get(name, (0, 0))
        numbers += ["", ""] if ratio is None else [f"{ratio:.2f}x", f"{low:.2f}, {high:.2f}"]
        lines.append(columns.format(*numbers).rstrip())
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> bytes:
    """Return PNG bytes: pairs per second with the spread over repetitions, and peak memory, one bar per contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {name: facts for name, facts in result["contenders"].items() if "error" not in facts}
    labels = [CONTENDERS[name].label for name in found]
    colors = [BLUE if name == OURS else GREY for name in found]
    speeds = [facts["pairs_per_second"] for facts in found.values()]
    each = [facts["reps"]["pairs_per_second"] for facts in found.values()]
    errors = [
        [value - min(some) for value, some in zip(speeds, each, strict=True)],
        [max(some) - value for value, some in zip(speeds, each, strict=True)],
    ]
    memory = [facts["peak_bytes"] / GIB for facts in found.values()]
    figure = Figure(figsize=(11, 0.5 * len(found) + 1.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    speed_bars = left.barh(labels, speeds, xerr=errors, color=colors, capsize=3)
    memory_bars = right.barh(labels, memory, color=colors)
    beside = [f"{speed:.2f}" + _times(result, name) for name, speed in zip(found, speeds, strict=True)]
    left.bar_label(speed_bars, beside, padding=6, fontsize=9)
    right.bar_label(memory_bars, [f"{value:.2f}" for value in memory], padding=4, fontsize=9)
    left.set_title(f"Pairs per second ({result['settings']['epochs']:g} epochs)", fontsize=11, loc="left")
    right.set_title("Peak memory (GiB)", fontsize=11, loc="left")
    left.invert_yaxis()
    for axes, values in ((left, speeds), (right, memory)):
        axes.set_xlim(0, 1.3 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _times(result: dict[str, Any], name: str) -> str:
    return f"  (ours {result['ratios'][name]:.1f}x)" if name in result["ratios"] else ""
