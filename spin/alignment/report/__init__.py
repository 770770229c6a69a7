"""The results of a run: a machine-readable summary, and a table, a plot and a page for readers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.console import escape_controls, say, show

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.report.collected import Collected
    from spin.alignment.report.reported_run import ReportedRun


def show_lineage(config: RunConfig) -> None:
    """Print what every model of the run starts from, its opponent and its training data."""
    from spin.alignment.pipeline.lineage import lineage
    from spin.alignment.report.table import lineage_table

    show(lineage_table(lineage(config)))


def write_report(config: RunConfig) -> Path:
    """Write the report of a run of `spin run`; see :func:`write_report_of`."""
    from spin.alignment.report.reported_run import run_of_config

    return write_report_of(run_of_config(config))


def write_report_of(run: ReportedRun, price_per_hour: float | None = None) -> Path:
    """Write summary.json, report.md, report.png and report.html into the run directory, complete the cards of its models and
    print the table; return the page.

    With ``price_per_hour`` of the machine, the page also has the cost of every stage, in the same currency.

    Raises:
        InputError: no stage of the run has produced results yet.
    """
    from spin.alignment.core.files import atomic_file, write_json_atomic, write_text_atomic
    from spin.alignment.report.cards import complete_cards
    from spin.alignment.report.collected import collect
    from spin.alignment.report.markdown_report import render_markdown
    from spin.alignment.report.page import render_page, run_page
    from spin.alignment.report.plots import plot

    collected = collect(run, price_per_hour)
    write_json_atomic(run.folder / "summary.json", collected.summary)
    with atomic_file(run.folder / "report.png") as file:
        file.write(plot(collected.summary))
    write_text_atomic(run.folder / "report.md", render_markdown(collected))
    page = run.folder / "report.html"
    write_text_atomic(page, render_page(run_page(collected)))
    complete_cards(collected)
    _show_results(collected)
    say(f"\nreport: {page}")
    return page


def write_comparison(run: ReportedRun, other: ReportedRun, price_per_hour: float | None = None) -> Path:
    """Write the page that compares two runs into the folder of the first, and print the comparisons; return the page.

    Raises:
        InputError: one of the runs has no results yet, or they are the same.
    """
    from spin.alignment.core.files import write_text_atomic
    from spin.alignment.report.collected import collect
    from spin.alignment.report.comparison import comparison_page, labels_of
    from spin.alignment.report.page import render_page

    labels = labels_of((run, other))
    found = [collect(item, price_per_hour) for item in (run, other)]
    content = comparison_page(list(zip(labels, found, strict=True)))
    page = run.folder / f"compared-with-{other.name}.html"
    write_text_atomic(page, render_page(content))
    for line in [*(text for text, _ in content.verdicts), *(f"warning: {line}" for line in content.warnings)]:
        say(escape_controls(line))
    say(f"\ncomparison: {page}")
    return page


def _show_results(collected: Collected) -> None:
    """Print the table, the headline, the verdicts and warnings, and a few responses."""
    from spin.alignment.report.headline import lines
    from spin.alignment.report.table import results_table

    summary = collected.summary
    # Without a terminal rich assumes 80 columns, too few for the table.
    show(results_table(summary), width=None if sys.stdout.isatty() else 120)
    for line in ["", *summary["verdicts"], "", *(f"warning: {line}" for line in summary["warnings"])]:
        say(line)
    for sample in collected.results.samples:
        known = "" if sample["ground_truth"] is None else f"  (ground truth: {sample['ground_truth']})"
        say(escape_controls(f"\n{sample['prompt']}{known}"))
        for model, response in sample["responses"].items():
            say(escape_controls(f"  {model}: {response}"))
    for line in ["", *lines(summary["headline"])]:
        say(line)
