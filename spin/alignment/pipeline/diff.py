"""How two runs differ: packages, settings, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin.alignment.core.console import escape_controls, say, show
from spin.alignment.pipeline.manifest import RunManifest


def differences(left: RunManifest, right: RunManifest) -> list[tuple[str, str, str, str]]:
    """Return (where, key, left, right) for every difference between two runs: packages, inputs, outputs."""
    rows = _mapping_differences("environment", left.environment, right.environment)
    for stage in [*left.stages, *(name for name in right.stages if name not in left.stages)]:
        mine, theirs = left.stages.get(stage), right.stages.get(stage)
        if mine is None or theirs is None:
            rows.append((stage, "stage", mine.state if mine else "absent", theirs.state if theirs else "absent"))
            continue
        rows += _mapping_differences(stage, mine.inputs, theirs.inputs)
        hashes = [{name: facts["hash"] for name, facts in record.outputs.items()} for record in (mine, theirs)]
        rows += _mapping_differences(f"{stage} output", *hashes)
    return rows


def _mapping_differences(
    where: str, left: Mapping[str, Any], right: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    keys = sorted(key for key in {**left, **right} if left.get(key) != right.get(key))
    return [(where, key, str(left.get(key, "absent")), str(right.get(key, "absent"))) for key in keys]


def show_differences(left: str, right: str) -> None:
    """Print a table of every difference between two runs.

    Raises:
        InputError: one of the folders contains no run.
    """
    from rich.table import Table

    from spin.alignment.pipeline.config import open_run

    for run_dir in (left, right):
        open_run(run_dir)
    rows = differences(RunManifest(left), RunManifest(right))
    if not rows:
        say("no difference: packages, settings, inputs and outputs are equal")
        return
    table = Table("where", "what", left, right)
    for row in rows:
        table.add_row(*map(escape_controls, row))
    show(table)
