"""The table of results and of the lineage: for a terminal (rich), for Markdown and for the page (cells)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import escape_controls

if TYPE_CHECKING:
    from rich.table import Table

# (heading, key, format); columns of other temperatures are inserted after T=1.
COLUMNS = (
    ("exact greedy", "greedy_exact", "{:.3f}"),
    ("exact T=1", "sampled_exact", "{:.3f}"),
    ("NLL", "nll", "{:.4f}"),
    ("identical", "identical_rate", "{:.1%}"),
    ("reward acc", "reward_accuracy", "{:.3f}"),
    ("margin", "margin", "{:.3f}"),
    ("chosen drift", "chosen_drift", "{:+.2f}"),
    ("length", "mean_length", "{:.1f}"),
    ("truncated", "truncation_rate", "{:.1%}"),
)
CAPTION = (
    "±: half of the 95 % interval over held-out prompts, responses or pairs; exact: share of held-out prompts answered right; "
    "NLL: nats per token of the ground truth; identical: generated responses equal to it; reward acc., margin, chosen drift "
    "(nats): last training log; length (tokens) and truncated: held-out responses"
)
LINEAGE_HEADINGS = ("model", "starts from", "opponent and reference", "data")


def cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one list of texts per model; a measure that no model has gets no column."""
    rows: Sequence[dict[str, Any]] = summary["rows"]
    columns = _columns(rows)
    headings = ["model", *(heading for heading, _, _ in columns)]
    return headings, [[row["model"], *(cell(row, key, form) for _, key, form in columns)] for row in rows]


def sort_values(summary: dict[str, Any]) -> list[list[float | None]]:
    """Return the value behind every text of :func:`cells`; None for names and missing values."""
    rows: Sequence[dict[str, Any]] = summary["rows"]
    return [[None, *(row.get(key) for _, key, _ in _columns(rows))] for row in rows]


def _columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    from spin.alignment.report.summary import exact_key

    others = sorted({t for row in rows for t in row.get("exact_at", {}) if t not in ("0", "1")}, key=float)
    extra = [(f"exact T={t}", exact_key(t), "{:.3f}") for t in others]
    return [item for item in (*COLUMNS[:2], *extra, *COLUMNS[2:]) if any(item[1] in row for row in rows)]


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """Return a value, followed by half the width of its 95 % interval if it is known; a dash if there is no value."""
    if key not in row:
        return "–"
    low, high = row.get(f"{key}_interval", (None, None))
    return form.format(row[key]) + ("" if low is None else f" ±{form.replace('+', '').format((high - low) / 2)}")


def results_table(summary: dict[str, Any]) -> Table:
    """Return the results as a rich table."""
    from rich import box
    from rich.table import Table

    headings, rows = cells(summary)
    table = Table(title="results", caption=CAPTION, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        first = heading == "model"
        table.add_column(heading, justify="left" if first else "right", no_wrap=first, min_width=13 if first else 5)
    for row in rows:
        table.add_row(*row)
    return table


def lineage_table(rows: Sequence[Sequence[str]]) -> Table:
    """Return the lineage as a rich table."""
    from rich.table import Table

    table = Table(title="lineage")
    for heading in LINEAGE_HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape_controls, row))
    return table


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
