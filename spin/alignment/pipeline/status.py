"""``spin status``: every stage of a run with its state and progress, or the fractions and servers of a generation."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.console import say, show

if TYPE_CHECKING:
    from spin.alignment.pipeline.manifest import RunManifest, StageRecord
    from spin.alignment.pipeline.stages import Stage


def stage_state(stage: Stage, manifest: RunManifest, is_held: bool, looks_at_outputs: bool = True) -> str:
    """Return pending, running, interrupted, failed, done (and whether an output has changed since), or that the run stopped."""
    record = manifest.stages.get(stage.name)
    stopped = manifest.stopped
    if stopped is not None and stage.iteration is not None and stage.iteration > stopped["iteration"]:
        return f"not run: stopped after iteration {stopped['iteration']}"
    if record is None:
        return "pending"
    if record.state == "running":
        return "running" if is_held else "interrupted"
    if record.state == "done":
        damaged = manifest.damaged_outputs(stage.name) if looks_at_outputs else []
        return f"done, but {damaged[0]} was changed or removed" if damaged else "done"
    return record.state


def running_seconds(record: StageRecord, state: str) -> float:
    """Return for how long a running stage has been running, by the clocks that wrote and read the record; 0 for others."""
    if state != "running" or not record.started_at:
        return 0.0
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(record.started_at)).total_seconds())


def show_training(folder: Path) -> bool:
    """Print the step of a training that is running in a folder, or was ended there; return False if there is none."""
    from spin.alignment.pipeline.stages.training import training_progress
    from spin.alignment.training.live_step import read_live_step

    live = read_live_step(folder)
    if live is None:
        return False
    say(f"{folder}: {'interrupted' if live.has_ended else 'running'}, {training_progress(folder)}")
    return True


def running_stages(run_dir: Path) -> dict[str, str]:
    """Return the progress of the stages of a run that are running now, by name; empty if nobody works on the run.

    Raises:
        InputError: the folder contains no run.
    """
    from spin.alignment.core.lock import is_locked
    from spin.alignment.pipeline.config import open_run
    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import make_stages

    stages, manifest, is_held = make_stages(open_run(run_dir)), RunManifest(run_dir), is_locked(run_dir)
    running = [stage for stage in stages if stage_state(stage, manifest, is_held, looks_at_outputs=False) == "running"]
    return {stage.name: stage.kind.progress(stage) for stage in running}


def show_status(path: str) -> None:
    """Show the stages of a run directory, the fractions in a folder of generate.py and who works on them, or the live step of a
    training in its output folder.
    """
    from spin.alignment.pipeline.fraction_status import show_fractions

    folder = Path(path)
    if not (folder / "run.yaml").exists() and folder.is_dir() and (show_fractions(folder) or show_training(folder)):
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
        seconds = f"{record.seconds + running_seconds(record, state):.0f}" if record else ""
        has_progress = record is not None and state not in ("done", "pending")
        table.add_row(stage.name, state, seconds, stage.kind.progress(stage) if has_progress else "")
    show(table, width=None if sys.stdout.isatty() else 120)
    if manifest.stopped is not None:
        say(f"stopped after iteration {manifest.stopped['iteration']}: {manifest.stopped['reason']}")
