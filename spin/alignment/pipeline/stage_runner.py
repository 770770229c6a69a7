"""Runs one stage: skips it if it is done, starts its programs, and records their outputs."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.program import EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED
from spin.alignment.pipeline.manifest import replaced_folder
from spin.alignment.pipeline.processes import ProgramEnded
from spin.alignment.pipeline.tracked_run import RunTrackers

if TYPE_CHECKING:
    from spin.alignment.pipeline.clusters import Cluster
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.manifest import RunManifest, StageRecord
    from spin.alignment.pipeline.run_view import RunView
    from spin.alignment.pipeline.stages import Stage


class StageFailed(Exception):
    """A program of a stage ended with a nonzero exit code (negative: a signal), or for the ``reason`` given."""

    def __init__(self, stage: str, code: int, log: Path, reason: str = "") -> None:
        super().__init__(stage)
        self.stage, self.code, self.log, self.reason = stage, code, log, reason


def is_interrupt(error: BaseException) -> bool:
    """Return whether a stage ended because the run was interrupted, and not because it failed."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, StageFailed) and error.code == EXIT_INTERRUPTED)


class StageRunner:
    """Runs stages of one run directory. Safe to use from several threads for different stages."""

    def __init__(self, config: RunConfig, manifest: RunManifest, cluster: Cluster, view: RunView) -> None:
        self.config, self.manifest, self.cluster, self.view = config, manifest, cluster, view
        self.trackers = RunTrackers(config)

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done; stale or damaged output is moved aside first.

        Raises:
            StageFailed: a program ended with a nonzero exit code.
            InputError: the output of the programs is not what the run requires, or a tracker cannot start.
        """
        inputs = stage.inputs(self.manifest)
        record = self.manifest.stages.get(stage.name)
        changed = record is not None and bool(self.manifest.changes(stage.name, inputs))
        if record is not None and not changed and self.manifest.is_done(stage.name):
            stage.kind.restore(stage)
            self.view.tell(f"{stage.name}: already complete")
            return
        self._clear(stage, record, changed)
        resumed = record is not None and not changed and record.state != "done"
        self.trackers.open()
        self.manifest.start(stage.name, inputs)
        started = time.monotonic()
        with self.view.stage(stage, "resuming" if resumed else "starting"):
            try:
                self._run_programs(stage)
            except BaseException as error:
                usage = self.cluster.take_usage(stage.name)
                self.manifest.stop(stage.name, time.monotonic() - started, is_interrupt(error), vars(usage))
                raise
            seconds = time.monotonic() - started
            usage = self.cluster.take_usage(stage.name)
            self.manifest.finish(stage.name, stage.outputs(), seconds, vars(usage))
        self.view.tell(f"{stage.name}: done in {seconds:.0f} s")
        self.trackers.report(stage, seconds)

    def _run_programs(self, stage: Stage) -> None:
        # On resume as well: the first attempt may have been killed before it wrote its files.
        stage.kind.prepare(stage)
        for settings in stage.configs:
            try:
                code = self.cluster.run(stage, settings)
            except ProgramEnded as ended:
                log = self.cluster.log_path(stage.name)
                raise StageFailed(stage.name, EXIT_INTERNAL_ERROR, log, str(ended)) from ended
            if code:
                raise StageFailed(stage.name, code, self.cluster.log_path(stage.name))
        missing = stage.kind.missing_outputs(stage)
        if missing:
            raise RuntimeError(f"{stage.name} succeeded but did not write {', '.join(missing)}")
        stage.kind.finish(stage, self.config)

    def _clear(self, stage: Stage, record: StageRecord | None, changed: bool) -> None:
        """Move aside output that is from other inputs, or that has changed since it was complete."""
        if record is None:
            return
        if changed:
            self._keep_replaced(stage, [stage.folder] if stage.folder else [], "its inputs changed")
        elif record.state == "done":
            damaged = [self.manifest.run_dir / name for name in self.manifest.damaged_outputs(stage.name)]
            suspects = stage.kind.suspects(stage, damaged)
            self._keep_replaced(stage, suspects, "files of its output were changed or removed")

    def _keep_replaced(self, stage: Stage, paths: list[Path], reason: str) -> None:
        """Move output that must no longer be used to RUN/replaced/, so that none of it ends up in the new output."""
        run_dir = self.manifest.run_dir
        kept = replaced_folder(run_dir)
        present = [path for path in paths if os.path.lexists(path)]
        for path in present:
            target = kept / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        if present:
            self.view.tell(f"{stage.name}: {reason}; the old output is kept in {kept}")
