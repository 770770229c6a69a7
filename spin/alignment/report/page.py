"""``report.html``: one self-contained page about a run, or about several runs compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spin.alignment.report.collected import Collected, WeightedPairs
from spin.alignment.report.conditions import conditions
from spin.alignment.report.costs import CAPTION as COST_CAPTION
from spin.alignment.report.costs import CLUSTER_HEADINGS, StageCost, stage_costs
from spin.alignment.report.costs import HEADINGS as COST_HEADINGS
from spin.alignment.report.page_data import named, page_data
from spin.alignment.report.render import render
from spin.alignment.report.reported_run import ReportedRun
from spin.alignment.report.table import CAPTION, LINEAGE_HEADINGS, cells, sort_values
from spin.alignment.report.weights_page import Scale

Cell = tuple[str, float | None]  # the text, and the value to sort by


@dataclass
class Page:
    """The content of the page. Empty sections are left out; rows of tables are lists of :data:`Cell`."""

    name: str
    title: str
    subtitle: str
    data: dict[str, Any]
    headlines: list[dict[str, Any]] = field(default_factory=list)
    result_headings: Sequence[str] = ()
    result_rows: list[list[Cell]] = field(default_factory=list)
    result_caption: str = CAPTION
    warnings: Sequence[str] = ()
    verdicts: Sequence[tuple[str, str]] = ()
    difference_headings: Sequence[str] = ()
    differences: list[list[Cell]] = field(default_factory=list)
    weights: Sequence[tuple[str, WeightedPairs, Scale]] = ()
    lineage_headings: Sequence[str] = LINEAGE_HEADINGS
    lineage: list[list[Cell]] = field(default_factory=list)
    cost_headings: Sequence[str] = ()
    cost_caption: str = COST_CAPTION
    costs: list[list[Cell]] = field(default_factory=list)
    conditions: Sequence[tuple[str, list[list[Cell]]]] = ()
    live: bool = False

    def sections(self) -> list[tuple[str, str]]:
        """Return (id, title) of every section that the page has."""
        having = {
            "results": ("Results", bool(self.result_rows)),
            "differences": ("Differences", bool(self.differences)),
            "progress": ("Progress", bool(self.data["measures"])),
            "training": ("Training", bool(self.data["training"]["models"])),
            "samples": ("Responses", bool(self.data["samples"]["prompts"])),
            "weights": ("Token weights", bool(self.weights)),
            "lineage": ("Lineage", bool(self.lineage)),
            "costs": ("Time and memory", bool(self.costs)),
            "settings": ("Settings", bool(self.conditions)),
        }
        return [(name, title) for name, (title, is_shown) in having.items() if is_shown]


def run_page(collected: Collected) -> Page:
    """Return the page of one run."""
    summary, run = collected.summary, collected.run
    headings, rows = result_table([("", collected)])
    cost_headings, costs = cost_table(collected)
    return Page(
        name=run.name,
        title=f"Self-play run {run.name}",
        subtitle=scored_on(summary),
        data=page_data([("", collected)]),
        headlines=[{"run": "", **summary["headline"]}] if summary["headline"] else [],
        result_headings=headings,
        result_rows=rows,
        warnings=summary["warnings"],
        verdicts=[(text, kind_of(text)) for text in summary["verdicts"]],
        weights=[(name, pairs, Scale.of_pairs(pairs)) for name, pairs in collected.weights.items()],
        lineage=[texts(row) for row in run.lineage],
        cost_headings=cost_headings,
        costs=costs,
        conditions=[(name, [texts(entry) for entry in entries]) for name, entries in conditions(run)],
    )


def waiting_page(run: ReportedRun) -> Page:
    """Return the page of a run without results: the states of its stages and its settings."""
    headings, costs = _cost_cells(stage_costs(run, {}), None)
    return Page(
        name=run.name,
        title=f"Self-play run {run.name}",
        subtitle="no results yet: the page is loaded again when there are some",
        data=page_data([]),
        lineage=[texts(row) for row in run.lineage],
        cost_headings=headings,
        costs=costs,
        conditions=[(name, [texts(entry) for entry in entries]) for name, entries in conditions(run)],
    )


def render_page(page: Page) -> str:
    """Return the page as HTML."""
    return render("report", page=page)


def result_table(labelled: Sequence[tuple[str, Collected]]) -> tuple[list[str], list[list[Cell]]]:
    """Return the headings and rows of the results of runs, with the names of :func:`page_data`."""
    rows = [row | {"model": named(label, row["model"])} for label, found in labelled for row in found.summary["rows"]]
    summary = {"rows": rows}
    headings, shown = cells(summary)
    values = sort_values(summary)
    return headings, [list(zip(*pair, strict=True)) for pair in zip(shown, values, strict=True)]


def scored_on(summary: dict[str, Any]) -> str:
    """Return on what the models were scored."""
    first = next((row for row in summary["rows"] if "metric" in row), None)
    return "not scored" if first is None else f"{first['metric']} on {first['n']} held-out prompts"


def cost_table(collected: Collected) -> tuple[list[str], list[list[Cell]]]:
    """Return the headings and rows of the table of costs, the last with the sum; no rows if nothing was recorded.

    The column of costs exists only if the price of an hour is known.
    """
    return _cost_cells(stage_costs(collected.run, collected.metrics), collected.price_per_hour)


def _cost_cells(costs: Sequence[StageCost], price: float | None) -> tuple[list[str], list[list[Cell]]]:
    on_cluster = any(cost.devices is not None for cost in costs)
    headings = [*COST_HEADINGS, *(CLUSTER_HEADINGS if on_cluster else ()), *(["cost"] if price is not None else [])]
    if not costs:
        return headings, []
    total, devices = sum(cost.seconds for cost in costs), sum(cost.devices or 0.0 for cost in costs)
    rows = [*costs, StageCost("all stages", "", total, devices=devices, restarts=sum(cost.restarts for cost in costs))]
    return headings, [[(cost.name, None), (cost.state, None), *cost.cells(total, price, on_cluster)] for cost in rows]


def kind_of(verdict: str) -> str:
    """Return "better", "worse" or, for no clear change, an empty text."""
    return next((word for word in ("better", "worse") if verdict.endswith(f"({word})")), "")


def texts(row: Sequence[str]) -> list[Cell]:
    """Return a row of texts as cells."""
    return [(text, None) for text in row]
