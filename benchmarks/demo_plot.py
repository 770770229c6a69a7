"""The picture at the top of README: what the demos' methods reach, from benchmarks/results/demos.json.

Drawn by scripts/make_docs.py when a number has changed; the numbers are kept in the file, so that a test can compare them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.result_tables import half_width, rows_of
from spin.alignment.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demos.png"
INK, QUIET, ACCENT = "#1b2330", "#9aa5b1", "#2158d6"
# Title, measure, and the bars from top to bottom: (entry of demos.json, model, label, whether it is a method).
PANELS = (
    (
        "A real chat model (135M): instructions followed",
        "greedy_exact/held-out prompts",
        (
            ("chat", "sft", "SmolLM2-135M-Instruct", False),
            ("chat", "sft_continued", "rejection sampling\n(control)", False),
            ("chat", "online", "online DPO", True),
        ),
    ),
    (
        "Learning from a checker: sorting letters, no ground truth",
        "greedy_exact",
        (
            ("online", "sft", "SFT start", False),
            ("online", "sft_continued", "more SFT (control)", False),
            ("sppo", "iter3", "SPPO, 4 iterations", True),
            ("online", "online", "online DPO", True),
        ),
    ),
    (
        "Self-play on SFT data: multiplication",
        "sampled_exact",
        (
            ("demo", "sft", "SFT start", False),
            ("demo", "sft_continued", "more SFT (control)", False),
            ("demo", "iter0", "SPIN iteration 0", True),
            ("demo", "iter2", "SPIN iteration 2", True),
        ),
    ),
)
MEASURES = {
    "greedy_exact/held-out prompts": "share followed on held-out prompts, greedy",
    "greedy_exact": "exact match on held-out prompts, greedy",
    "sampled_exact": "exact match on held-out prompts, T=1",
}


def numbers() -> dict[str, list[float]]:
    """Return for each bar its mean over seeds, half of its 95 % interval, and the value of each seed, rounded."""
    found = {}
    for _, key, bars in PANELS:
        for entry, model, _, _ in bars:
            rows = rows_of(entry, model)
            values = [row[key] for row in rows]
            half = half_width(rows, key) or 0.0
            found[f"{entry}/{model}/{key}"] = [round(value, 4) for value in (sum(values) / len(values), half, *values)]
    return found


def numbers_in(picture: Path) -> dict[str, list[float]]:
    """Return the numbers that a picture was drawn from; empty if it does not exist."""
    from PIL import Image

    if not picture.exists():
        return {}
    with Image.open(picture) as image:
        found: dict[str, list[float]] = json.loads(image.info.get("Description", "{}"))
    return found


def draw(picture: Path = PICTURE) -> bool:
    """Draw the picture, if its numbers have changed; return whether they have."""
    found = numbers()
    if numbers_in(picture) == found:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.5, 2.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (title, key, bars) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for place, (entry, model, _, is_method) in enumerate(bars):
            _bar(axes, place, found[f"{entry}/{model}/{key}"], ACCENT if is_method else QUIET)
        axes.set_yticks(range(len(bars)), [label for _, _, label, _ in bars])
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(MEASURES[key], color=INK)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Description": json.dumps(found)})
    return True


def _bar(axes: Axes, place: int, values: list[float], color: str) -> None:
    """Draw a mean with its interval and the values of the seeds."""
    mean, half, *seeds = values
    axes.barh(place, mean, height=0.62, color=color)
    axes.errorbar(mean, place, xerr=half, color=INK, capsize=3, linewidth=1)
    axes.plot(seeds, [place] * len(seeds), "o", color="white", markeredgecolor=INK, markersize=4)
    axes.text(max([mean + half, *seeds]) + 0.03, place, f"{mean:.2f}", va="center", fontsize=10, color=INK)
