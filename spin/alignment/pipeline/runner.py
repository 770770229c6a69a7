"""Runs the stages of a run, in order or beside each other, and records what is done."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.manifest import StageRecord
    from spin.alignment.pipeline.stages import Stage


class StageFailed(Exception):
    """A stage's program ended with another code than 0."""

    def __init__(self, stage: str, code: int, log: Path) -> None:
        super().__init__(stage)
        self.stage, self.code, self.log = stage, code, log


class Pipeline:
    """Runs the stages of one configuration into its run directory, which it holds locked meanwhile."""

    def __init__(self, config: RunConfig, stages: list[Stage], rerun_changed: bool = False) -> None:
        from spin.alignment.pipeline.manifest import RunManifest
        from spin.alignment.pipeline.processes import ChildPrograms

        self.config, self.rerun_changed = config, rerun_changed
        self.run_dir = Path(config.run_dir)
        self.manifest = RunManifest(self.run_dir)
        self.stages = stages
        self.parallel = config.launch.parallel
        self.children = ChildPrograms(self.run_dir, one_thread=self.parallel, prefix=self.parallel)
        self._finished: set[str] = set()
        self._turn = threading.Condition()
        self._failure: BaseException | None = None

    def changed_stages(self) -> dict[str, list[str]]:
        """Return the finished stages that were made from other settings or files, and what differs."""
        changed = {}
        for stage in self.stages:
            record = self.manifest.stages.get(stage.name)
            if record is None or record.state != "done":
                continue
            differing = self.manifest.changes(stage.name, stage.inputs(self.manifest))
            if differing:
                changed[stage.name] = differing
        return changed

    def refuse_changes(self) -> None:
        """Raise :class:`InputError` when a finished stage would have to be made again and nobody asked for that."""
        changed = self.changed_stages()
        if changed and not self.rerun_changed:
            name, differing = next(iter(changed.items()))
            others = f" (and {len(changed) - 1} more stages)" if len(changed) > 1 else ""
            raise InputError(
                f"{self.run_dir} was made otherwise: {name}{others}: {'; '.join(differing)}; choose another run_dir, or pass "
                "--rerun_changed to make these stages again"
            )

    def run(self) -> None:
        """Run every stage that is not done.

        Raises:
            StageFailed: a program ended with another code than 0; what ran beside it has been stopped.
        """
        if not self.parallel:
            for stage in self.stages:
                self._run_stage(stage)
            return
        chains = [[stage for stage in self.stages if stage.is_beside is beside] for beside in (False, True)]
        threads = [threading.Thread(target=self._run_chain, args=(chain,)) for chain in chains]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a timeout would not let a signal through
                thread.join(timeout=0.2)
        if self._failure is not None:
            raise self._failure

    def _run_chain(self, chain: list[Stage]) -> None:
        known = {stage.name for stage in self.stages}
        try:
            for stage in chain:
                if stage.is_beside and stage.after in known:
                    with self._turn:
                        self._turn.wait_for(lambda: stage.after in self._finished or self._failure is not None)  # noqa: B023
                if self._failure is not None:
                    return
                self._run_stage(stage)
                with self._turn:
                    self._finished.add(stage.name)
                    self._turn.notify_all()
        except BaseException as failure:
            with self._turn:
                self._failure = self._failure or failure
                self._turn.notify_all()
            self.children.stop()

    def interrupt(self) -> None:
        """End every child; both chains come to their end."""
        with self._turn:
            self._failure = self._failure or KeyboardInterrupt()
            self._turn.notify_all()
        self.children.stop()

    def _run_stage(self, stage: Stage) -> None:
        inputs = stage.inputs(self.manifest)
        record = self.manifest.stages.get(stage.name)
        if record is not None and record.inputs == inputs and self.manifest.is_done(stage.name):
            say(f"==> {stage.name}: done already")
            return
        if record is not None and record.inputs != inputs:
            self._move_aside(stage, [folder for folder in stage.folders if folder.is_dir()], "its inputs changed")
        elif record is not None and record.state == "done":
            self._move_aside(stage, self._suspect_files(stage), "files of its output were changed or removed")
        say(f"==> {stage.name}: {'going on' if self._is_partial(record, inputs) else 'starting'}")
        self.manifest.start(stage.name, inputs)
        started = time.monotonic()
        try:
            self._start_programs(stage)
        except BaseException:
            self.manifest.stop(stage.name, time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        self.manifest.finish(stage.name, stage.outputs(), seconds)
        say(f"==> {stage.name}: done in {seconds:.0f} s")

    @staticmethod
    def _is_partial(record: StageRecord | None, inputs: dict[str, Any]) -> bool:
        return record is not None and record.inputs == inputs and record.state != "done"

    def _start_programs(self, stage: Stage) -> None:
        import yaml

        from spin.alignment.core.files import write_text_atomic
        from spin.alignment.pipeline.lineage import check_lineage
        from spin.alignment.pipeline.stages import missing_outputs

        if stage.config_file is not None:
            write_text_atomic(stage.config_file, yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True))
        for command in stage.commands:
            code = self.children.run(stage.name, command)
            if code:
                raise StageFailed(stage.name, code, self.children.log_path(stage.name))
        missing = missing_outputs(stage)
        if missing:
            raise RuntimeError(f"{stage.name} ended well but did not write {', '.join(missing)}")
        if stage.config_file is not None:
            copied = stage.folders[0] / "metrics.json"
            write_text_atomic(stage.config_file.with_name("metrics.json"), copied.read_text(encoding="utf-8"))
        if stage.name.endswith("/convert"):
            check_lineage(self.config, int(stage.name.removeprefix("iter").partition("/")[0]))

    def _suspect_files(self, stage: Stage) -> list[Path]:
        """Return the files that a program must not take for its own complete output: damaged ones, or a damaged model."""
        damaged = [self.run_dir / name for name in self.manifest.damaged_outputs(stage.name)]
        suspects = stage.outputs() if stage.config_file is not None else damaged
        return [path for path in suspects if path.exists()]

    def _move_aside(self, stage: Stage, paths: list[Path], reason: str) -> None:
        """Keep output that is not to be used any more: nothing of it may leak into the new one."""
        kept = self.run_dir / "replaced" / time.strftime("%Y%m%d-%H%M%S")
        for path in paths:
            target = kept / path.relative_to(self.run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        if paths:
            say(f"==> {stage.name}: {reason}; the old output is kept in {kept}")


def run_stages(
    config: RunConfig,
    rerun_changed: bool,
    begin: Callable[[RunConfig], Any],
    finish: Callable[[RunConfig], Any],
) -> int:
    """Run a checked configuration; return the exit code.

    ``begin`` is called before the first stage and ``finish`` after the last one, both with the run directory locked.
    """
    import yaml

    from spin.alignment.core.files import write_text_atomic
    from spin.alignment.pipeline.lock import RunLock
    from spin.alignment.pipeline.stages import make_stages

    run_dir = Path(config.run_dir)
    with RunLock(run_dir):
        pipeline = Pipeline(config, make_stages(config), rerun_changed)
        pipeline.refuse_changes()
        pipeline.manifest.save()
        write_text_atomic(run_dir / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
        begin(config)
        try:
            pipeline.run()
        except StageFailed as failure:
            return explain(failure)
        except KeyboardInterrupt:
            pipeline.interrupt()
            raise
        finish(config)
    return EXIT_DONE


def explain(failure: StageFailed) -> int:
    """Say which stage ended how; return the exit code of the run."""

    code = failure.code if failure.code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED) else EXIT_FAULT
    reason = {EXIT_BAD_INPUT: "its input is bad, see the sentence above", EXIT_INTERRUPTED: "it was interrupted"}
    said = reason.get(code, f"its program failed (exit code {failure.code})")
    say_error(f"error: {failure.stage} stopped: {said}; log: {failure.log}; run again to go on")
    return code
