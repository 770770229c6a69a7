"""The plot of a run: exact match, NLL, preference dynamics, drift and length over the iterations."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#ea7317", "#15803d", "#6b7280"


def plot(summary: dict[str, Any]) -> bytes:
    """Return the plot as PNG bytes: SFT start and iterations along the x axis, continued SFT as a dotted line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in summary["rows"] if row["role"] != "control"]
    control: dict[str, Any] = next((row for row in summary["rows"] if row["role"] == "control"), {})
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    # Drawn without pyplot, which keeps global state and may look for a display.
    FigureCanvasAgg(figure)
    exact, nll, dynamics, drift = figure.subplots(2, 2).flat
    _curve(exact, rows, "greedy_exact", "greedy", BLUE, control)
    _curve(exact, rows, "sampled_exact", "T=1", ORANGE, control)
    _cooler(exact, rows)
    _curve(nll, rows, "nll", "NLL", GREEN, control)
    _curve(dynamics, rows, "reward_accuracy", "reward accuracy", BLUE)
    _curve(dynamics.twinx(), rows, "margin", "margin (nats, times beta; right)", ORANGE)
    _curve(drift, rows, "chosen_drift", "chosen drift (nats)", GREEN)
    _curve(drift.twinx(), rows, "mean_length", "mean length (tokens; right)", GREY)
    metric = next((row["metric"] for row in summary["rows"] if "metric" in row), "exact_match")
    scored = "Exact match" if metric == "exact_match" else metric
    titles = (f"{scored}, held-out", "NLL of the ground truth (nats per token)", "Preference", "Drift and length")
    for axes, title in zip((exact, nll, dynamics, drift), titles, strict=True):
        _style(axes, title, [row["model"] for row in rows])
    exact.set_ylim(0, max(0.1, 1.15 * exact.get_ylim()[1]))
    dynamics.set_ylim(0, 1.05)
    for axes in (exact, nll):
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8)
    _joint_legends(figure.axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _curve(
    axes: Axes, rows: list[dict[str, Any]], key: str, label: str, color: str, control: dict[str, Any] | None = None
) -> None:
    points = [(index, row) for index, row in enumerate(rows) if key in row]
    if not points:
        return
    positions, values = [index for index, _ in points], [row[key] for _, row in points]
    intervals = [row.get(f"{key}_interval", (row[key], row[key])) for _, row in points]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
    bars = (below, above) if any([*below, *above]) else None
    axes.errorbar(positions, values, yerr=bars, fmt="o-", color=color, label=label, capsize=3)
    if control and key in control:
        axes.axhline(control[key], color=color, linestyle=":", label=f"{label}, continued SFT")


def _cooler(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The temperature control: the accuracy of the first model when it is only sampled at a lower temperature."""
    for temperature, value in (rows[0].get("exact_at", {}) if rows else {}).items():
        if 0 < float(temperature) < 1:
            axes.axhline(value, color=GREY, linestyle="--", label=f"{rows[0]['model']} at T={temperature}")


def _style(axes: Axes, title: str, models: list[str]) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xticks(range(len(models)), models)
    axes.set_xlim(-0.3, max(len(models) - 0.7, 0.3))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _joint_legends(panels: list[Axes]) -> None:
    """One legend for both y axes of a panel."""
    *_, dynamics, drift, margin, length = panels
    for left, right in ((dynamics, margin), (drift, length)):
        handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        if handles:
            left.legend(handles=handles, frameon=False, fontsize=8)
        right.spines[["top"]].set_visible(False)
