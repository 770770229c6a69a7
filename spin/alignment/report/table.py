"""The table of results and of the lineage: for a terminal (rich), for Markdown and for the page (cells)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import escape_controls

if TYPE_CHECKING:
    from rich.table import Table

# (heading, key, format); columns of other temperatures and of groups are inserted after T=1. ``{score}`` is exact or score.
COLUMNS = (
    ("{score} greedy", "greedy_exact", "{:.3f}"),
    ("{score} T=1", "sampled_exact", "{:.3f}"),
    ("wins", "win_rate", "{:.1%}"),
    ("LC wins", "lc_win_rate", "{:.1%}"),
    ("NLL", "nll", "{:.4f}"),
    ("identical", "identical_rate", "{:.1%}"),
    ("reward acc", "reward_accuracy", "{:.3f}"),
    ("margin", "margin", "{:.3f}"),
    ("chosen drift", "chosen_drift", "{:+.2f}"),
    ("length", "mean_length", "{:.1f}"),
    ("truncated", "truncation_rate", "{:.1%}"),
)
# Metrics that are 1 for a right answer and otherwise 0.
_EXACT = ("exact_match", "math_answer", "math_verify")
CAPTION = (
    "±: half of the 95 % interval over held-out prompts, responses or pairs; exact: share of held-out prompts answered right; "
    "score: mean of another metric over them; "
    "wins: share of comparisons with SFT won, ties half, LC at equal lengths; "
    "NLL: nats per token of the ground truth; identical: generated responses equal to it; reward acc., margin, chosen drift "
    "(nats): last training log; length (tokens) and truncated: held-out responses"
)
LINEAGE_HEADINGS = ("model", "starts from", "opponent and reference", "data")


def cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one list of texts per model; a measure that no model has gets no column."""
    rows: Sequence[dict[str, Any]] = [with_groups(row) for row in summary["rows"]]
    columns = _columns(rows)
    headings = ["model", *(heading for heading, _, _ in columns)]
    return headings, [[row["model"], *(cell(row, key, form) for _, key, form in columns)] for row in rows]


def sort_values(summary: dict[str, Any]) -> list[list[float | None]]:
    """Return the value behind every text of :func:`cells`; None for names and missing values."""
    rows: Sequence[dict[str, Any]] = [with_groups(row) for row in summary["rows"]]
    return [[None, *(row.get(key) for _, key, _ in _columns(rows))] for row in rows]


def _columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return (heading, key, format) of every measure that a row has; ``rows`` are those of :func:`with_groups`."""
    from spin.alignment.report.summary import REPEATED, exact_key, task_key
    from spin.alignment.report.verdicts import group_key

    others = sorted({t for row in rows for t in row.get("exact_at", {}) if t not in ("0", "1")}, key=float)
    groups = dict.fromkeys(name for row in rows for name in row.get("groups", {}))
    extra = [(f"{{score}} T={t}", exact_key(t), "{:.3f}") for t in others]
    extra += [(f"{name}, greedy", group_key("greedy_exact", name), "{:.3f}") for name in groups]
    repeated = dict.fromkeys(
        key for row in rows for key in row if key.startswith(REPEATED) and not key.endswith(("_se", "_interval"))
    )
    extra += [(key, key, "{:.3f}") for key in repeated]
    tasks = dict.fromkeys(name for row in rows for name in row.get("tasks", {}))
    extra += [(name, task_key(name), "{:.4f}") for name in tasks]
    metric = next((row["metric"] for row in rows if "metric" in row), "exact_match")
    word = "exact" if metric in _EXACT else "score"
    columns = [item for item in (*COLUMNS[:2], *extra, *COLUMNS[2:]) if any(item[1] in row for row in rows)]
    return [(heading.replace("{score}", word), key, form) for heading, key, form in columns]


def with_groups(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the scores of its groups at its top level: ``greedy_exact/GROUP`` and so on."""
    from spin.alignment.report.verdicts import group_key

    flat = {
        f"{group_key(key, name)}{part}": values[f"{key}{part}"]
        for name, values in row.get("groups", {}).items()
        for key in ("greedy_exact", "sampled_exact", "sampled_exact_t05")
        for part in ("", "_se", "_interval")
        if f"{key}{part}" in values
    }
    return row | flat


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
