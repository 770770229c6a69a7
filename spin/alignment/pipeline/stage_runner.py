"""Runs one stage: skips it when it is done, starts its programs, and records what they made."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.manifest import RunManifest, StageRecord
    from spin.alignment.pipeline.processes import ChildPrograms
    from spin.alignment.pipeline.stages import Stage


class StageFailed(Exception):
    """A stage's program ended with another code than 0."""

    def __init__(self, stage: str, code: int, log: Path) -> None:
        super().__init__(stage)
        self.stage, self.code, self.log = stage, code, log


class StageRunner:
    """Runs stages of one run directory. Safe to use from several threads for different stages."""

    def __init__(self, config: RunConfig, manifest: RunManifest, children: ChildPrograms) -> None:
        self.config, self.manifest, self.children = config, manifest, children

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done; what it must not take for its own complete output is moved aside first.

        Raises:
            StageFailed: a program ended with another code than 0.
            InputError: what the programs wrote is not what the run asked for.
        """
        inputs = stage.inputs(self.manifest)
        record = self.manifest.stages.get(stage.name)
        if record is not None and record.inputs == inputs and self.manifest.is_done(stage.name):
            say(f"==> {stage.name}: done already")
            return
        self._clear(stage, record, inputs)
        goes_on = record is not None and record.inputs == inputs and record.state != "done"
        say(f"==> {stage.name}: {'going on' if goes_on else 'starting'}")
        self.manifest.start(stage.name, inputs)
        started = time.monotonic()
        try:
            self._run_programs(stage)
        except BaseException:
            self.manifest.stop(stage.name, time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        self.manifest.finish(stage.name, stage.outputs(), seconds)
        say(f"==> {stage.name}: done in {seconds:.0f} s")

    def _run_programs(self, stage: Stage) -> None:
        stage.kind.prepare(stage)
        for command in stage.commands:
            code = self.children.run(stage.name, command)
            if code:
                raise StageFailed(stage.name, code, self.children.log_path(stage.name))
        missing = stage.kind.missing_outputs(stage)
        if missing:
            raise RuntimeError(f"{stage.name} ended well but did not write {', '.join(missing)}")
        stage.kind.finish(stage, self.config)

    def _clear(self, stage: Stage, record: StageRecord | None, inputs: dict[str, Any]) -> None:
        """Move output aside that was made from other inputs, or that was changed since it was complete."""
        if record is None:
            return
        if record.inputs != inputs:
            self._keep_replaced(stage, [stage.folder] if stage.folder else [], "its inputs changed")
        elif record.state == "done":
            damaged = [self.manifest.run_dir / name for name in self.manifest.damaged_outputs(stage.name)]
            suspects = stage.kind.suspects(stage, damaged)
            self._keep_replaced(stage, suspects, "files of its output were changed or removed")

    def _keep_replaced(self, stage: Stage, paths: list[Path], reason: str) -> None:
        """Keep output that is not to be used any more: nothing of it may leak into the new one."""
        run_dir = self.manifest.run_dir
        kept = run_dir / "replaced" / time.strftime("%Y%m%d-%H%M%S")
        present = [path for path in paths if path.exists()]
        for path in present:
            target = kept / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        if present:
            say(f"==> {stage.name}: {reason}; the old output is kept in {kept}")
