"""The table of the SFT benchmark, and the check that all contenders compute the same losses."""

from __future__ import annotations

from typing import Any

from benchmarks.report import GIB


def loss_differences(records: dict[str, list[dict[str, float]]], verified: int) -> dict[str, dict[str, float]]:
    """Return how much each contender differs from the first one in the verified steps.

    * loss: relative difference of the loss before the first update;
    * gain: difference of the loss after it on the same batch, relative to the decrease caused by that update.
    """
    first, *_ = records.values()
    before, after = first[0]["loss"], first[verified - 1]["loss"]
    return {
        name: {
            "loss": abs(found[0]["loss"] / before - 1),
            "gain": abs(found[verified - 1]["loss"] - after) / abs(before - after),
        }
        for name, found in records.items()
    }


def table(result: dict[str, Any]) -> str:
    """Return the table that people read."""
    columns = "{:<28}{:>10}{:>8}{:>12}{:>9}{:>9}  {}"
    lines = [
        columns.format("", "distinct", "peak", "above base", "of the", "ours", "from, to"),
        columns.format("", "tokens/s", "GiB", "GiB", "matmuls", "faster", ""),
    ]
    for name, facts in result["contenders"].items():
        if "error" in facts:
            lines.append(f"{facts['label']:<28}  failed: {facts['error'].splitlines()[0]}")
            continue
        numbers = [
            facts["label"],
            f"{facts['tokens_per_second']:.1f}",
            f"{facts['peak_bytes'] / GIB:.2f}",
            f"{facts['peak_above_baseline_bytes'] / GIB:.2f}",
            f"{facts['matmul_fraction']:.0%}",
        ]
        ratio, (low, high) = result["ratios"].get(name), result["ratio_spread"].get(name, (0, 0))
        numbers += ["", ""] if ratio is None else [f"{ratio:.2f}x", f"{low:.2f}, {high:.2f}"]
        lines.append(columns.format(*numbers).rstrip())
    return "\n".join(lines)
