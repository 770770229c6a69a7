"""One plot per study: every model in every measure, with its 95 % interval over prompts; one point for each seed."""

from __future__ import annotations

import io
from collections.abc import Sequence

from benchmarks.evidence.measures import COLUMNS, Trained, estimate
from benchmarks.evidence.plan import STUDIES

SHOWN = ("prompt_strict", "instruction_strict", "gsm8k", "nll")


def study_plot(study: str, models: Sequence[Trained]) -> bytes:
    """Return a PNG of the main measures of a study's models, the start first; without those known of the start only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [
        column
        for column in COLUMNS
        if column.measure.key in SHOWN and any(model.seeds(column.benchmark) for model in models[1:])
    ]
    figure = Figure(figsize=(3.2 * len(columns), 1.2 + 0.35 * len(models)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for place, model in enumerate(models):
            seeds = model.seeds(column.benchmark)
            for index, seed in enumerate(seeds):
                found = estimate(model.values(column, seed))
                low, high = found.interval or (found.value, found.value)
                axes.errorbar(
                    found.value,
                    place + 0.18 * (index - (len(seeds) - 1) / 2),
                    xerr=[[max(0.0, found.value - low)], [max(0.0, high - found.value)]],
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    color="#888888" if model is models[0] else "#1f77b4",
                )
        axes.set_title(column.measure.name + (" (lower is better)" if column.lower_is_better else ""), fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(models)), [model.label for model in models], fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(STUDIES[study].title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
