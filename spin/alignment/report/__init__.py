"""The results of a run: a machine-readable summary, and a table, a plot and a page for readers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.console import escape_controls, say, show

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig


def show_lineage(config: RunConfig) -> None:
    """Print what every model of the run starts from, its opponent and its training data."""
    from spin.alignment.pipeline.lineage import lineage
    from spin.alignment.report.table import lineage_table

    show(lineage_table(lineage(config)))


def write_report(config: RunConfig) -> Path:
    """Write summary.json, report.png and report.html into the run directory and print the table; return the page.

    Raises:
        InputError: no stage of the run has produced results yet.
    """
    from spin.alignment.core.files import atomic_file, write_json_atomic, write_text_atomic
    from spin.alignment.pipeline.lineage import lineage
    from spin.alignment.report.page import render_page
    from spin.alignment.report.plots import plot
    from spin.alignment.report.summary import summarize
    from spin.alignment.report.table import results_table

    run_dir = Path(config.run_dir)
    summary, samples = summarize(config)
    write_json_atomic(run_dir / "summary.json", summary)
    image = plot(summary)
    with atomic_file(run_dir / "report.png") as file:
        file.write(image)
    page = run_dir / "report.html"
    write_text_atomic(page, render_page(run_dir.name, summary, samples, lineage(config), image))
    # Without a terminal rich assumes 80 columns, too few for the table.
    show(results_table(summary), width=None if sys.stdout.isatty() else 120)
    for line in ["", *summary["verdicts"], "", *(f"warning: {line}" for line in summary["warnings"])]:
        say(line)
    for sample in samples:
        known = "" if sample["ground_truth"] is None else f"  (ground truth: {sample['ground_truth']})"
        say(escape_controls(f"\n{sample['prompt']}{known}"))
        for model, response in sample["responses"].items():
            say(escape_controls(f"  {model}: {response}"))
    say(f"\nreport: {page}")
    return page
