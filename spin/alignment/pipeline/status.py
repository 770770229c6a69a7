"""``spin status``: every stage of a run with its state and progress, or the fractions and servers of a generation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.console import say, show

if TYPE_CHECKING:
    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import Stage


def stage_state(stage: Stage, manifest: RunManifest, is_held: bool) -> str:
    """Return pending, running, interrupted, failed or done (with an output that changed since), or that the run stopped."""
    record = manifest.stages.get(stage.name)
    stopped = manifest.stopped
    if stopped is not None and stage.iteration is not None and stage.iteration > stopped["iteration"]:
        return f"not run: stopped after iteration {stopped['iteration']}"
    if record is None:
        return "pending"
    if record.state == "running":
        return "running" if is_held else "interrupted"
    if record.state == "done":
        damaged = manifest.damaged_outputs(stage.name)
        return f"done, but {damaged[0]} was changed or removed" if damaged else "done"
    return record.state


def show_status(path: str) -> None:
    """Show the stages of a run directory, or the fractions in a folder of generate.py and who works on them."""
    from spin.alignment.pipeline.fraction_status import show_fractions

    folder = Path(path)
    if not (folder / "run.yaml").exists() and folder.is_dir() and show_fractions(folder):
        return
    from rich.table import Table

    from spin.alignment.core.lock import is_locked
    from spin.alignment.pipeline.config import open_run
    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import make_stages

    config = open_run(path)
    manifest, is_held = RunManifest(path), is_locked(path)
    table = Table("stage", "state", "seconds", "progress", title=f"{Path(path)}")
    for stage in make_stages(config):
        record = manifest.stages.get(stage.name)
        state = stage_state(stage, manifest, is_held)
        seconds = f"{record.seconds:.0f}" if record else ""
        table.add_row(
            stage.name, state, seconds, "" if record is None or state == "done" else stage.kind.progress(stage)
        )
    show(table)
    if manifest.stopped is not None:
        say(f"stopped after iteration {manifest.stopped['iteration']}: {manifest.stopped['reason']}")
