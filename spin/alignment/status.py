"""``spin status RUN``: every stage with its state, its seconds and, for generation, how far it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spin.programs import Parser

if TYPE_CHECKING:
    from spin.alignment.manifest import RunManifest
    from spin.alignment.stages import Stage


def stage_state(stage: Stage, manifest: RunManifest, is_held: bool) -> str:
    """Return pending, running, interrupted, failed, done, or done with what became of it since."""
    record = manifest.stages.get(stage.name)
    if record is None:
        return "pending"
    if record.state == "running":
        return "running" if is_held else "interrupted"
    if record.state == "done":
        damaged = manifest.damaged_outputs(stage.name)
        return f"done, but {damaged[0]} was changed or removed" if damaged else "done"
    return record.state


def progress(stage: Stage) -> str:
    """Return how far a stage that is not done has come, from the files it writes on the way."""
    if stage.program == "generate.py":
        complete = sum(path.is_file() for path in stage.outputs())
        parts = len(list(stage.folders[0].glob(".parts/*/part-*.parquet")))
        return f"{complete} of {len(stage.outputs())} fractions, {parts} parts of the next"
    if stage.config_file is not None:
        steps = [
            int(found[1])
            for path in stage.folders[0].glob("checkpoint-*")
            if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
        ]
        return f"checkpoint at step {max(steps)}" if steps else ""
    return ""


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="spin status", description="Show where a run stands.")
    parser.add_argument("run_dir", help="folder of a run")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    from spin.alignment.manifest import RunLock, RunManifest
    from spin.alignment.run_config import open_run
    from spin.alignment.stages import make_stages

    config = open_run(options.run_dir)
    manifest, is_held = RunManifest(options.run_dir), RunLock.is_held(options.run_dir)
    table = Table("stage", "state", "seconds", "progress", title=f"{Path(options.run_dir)}")
    for stage in make_stages(config):
        record = manifest.stages.get(stage.name)
        state = stage_state(stage, manifest, is_held)
        seconds = f"{record.seconds:.0f}" if record else ""
        table.add_row(stage.name, state, seconds, "" if state in ("done", "pending") else progress(stage))
    Console().print(table)
