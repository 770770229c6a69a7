"""``report.md``: the report of a run as Markdown, for a pull request, a model card or a terminal."""

from __future__ import annotations

from spin.alignment.report.collected import Collected
from spin.alignment.report.headline import lines
from spin.alignment.report.page import cost_table, scored_on
from spin.alignment.report.table import CAPTION, LINEAGE_HEADINGS, cells, markdown


def render_markdown(collected: Collected) -> str:
    """Return headline, table, warnings, verdicts, lineage and costs."""
    summary, run = collected.summary, collected.run
    said = lines(summary["headline"])
    parts = [f"# Self-play run {run.name}", scored_on(summary)]
    parts += [f"**{said[0]}**", *said[1:]] if said else []
    parts += [markdown(*cells(summary)).strip(), CAPTION]
    for heading, found in (("Warnings", summary["warnings"]), ("Verdicts", summary["verdicts"])):
        parts += [f"## {heading}", "\n".join(f"- {line}" for line in found)] if found else []
    parts += ["## Lineage", markdown(LINEAGE_HEADINGS, run.lineage).strip()]
    headings, costs = cost_table(collected)
    rows = [[text for text, _ in row] for row in costs]
    parts += ["## Time and memory", markdown(headings, rows).strip()] if rows else []
    return "\n\n".join(parts) + "\n"
