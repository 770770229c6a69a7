"""``spin doctor``: prints what works on this machine and what does not."""

from __future__ import annotations

from collections.abc import Sequence

from spin.alignment.doctor import machine_findings, optional_findings, package_findings
from spin.programs import EXIT_BAD_INPUT, EXIT_DONE, Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="spin doctor", description="Say which packages, devices and backends work here, and why not.")
    parser.parse_args(arguments)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = [*machine_findings(), *package_findings(), *optional_findings()]
    table = Table("what", "verdict", "detail")
    colors = {"ok": "green", "absent": "yellow", "broken": "red"}
    for finding in findings:
        table.add_row(finding.what, f"[{colors[finding.verdict]}]{finding.verdict}[/]", escape(finding.detail))
    Console().print(table)
    unfit = [finding.what for finding in findings if finding.needed and finding.verdict != "ok"]
    print(f"mend first: {', '.join(unfit)}" if unfit else "everything needed works")
    return EXIT_BAD_INPUT if unfit else EXIT_DONE
