"""Runs the stages of a run, in order or in parallel."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERNAL_ERROR, EXIT_INTERRUPTED
from spin.alignment.pipeline.stage_runner import StageFailed, StageRunner

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.stages import Stage


class Pipeline:
    """The stages of one configuration, run into its run directory."""

    def __init__(self, config: RunConfig, stages: list[Stage], rerun_changed: bool = False) -> None:
        from spin.alignment.pipeline.clusters import CLUSTERS, ClusterSettings
        from spin.alignment.pipeline.manifest import RunManifest
        from spin.alignment.pipeline.run_view import RunView

        self.config, self.stages, self.rerun_changed = config, stages, rerun_changed
        self.parallel = config.launch.parallel
        self.manifest = RunManifest(config.run_dir)
        self.view = RunView(stages, self.manifest)
        settings = ClusterSettings(self.manifest.run_dir, config.launch, secrets_of(stages), self.view.look)
        self.cluster = CLUSTERS[config.launch.cluster](settings)
        self.runner = StageRunner(config, self.manifest, self.cluster, self.view)
        self._unfinished = {stage.name for stage in stages}
        self._turn = threading.Condition()
        self._failure: BaseException | None = None

    def changed_stages(self) -> dict[str, list[str]]:
        """Return the finished stages whose settings or input files have changed, and what differs."""
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
        """Raise :class:`InputError` if a finished stage would have to run again without ``rerun_changed``."""
        changed = self.changed_stages()
        if changed and not self.rerun_changed:
            name, differing = next(iter(changed.items()))
            others = f" (and {len(changed) - 1} more stages)" if len(changed) > 1 else ""
            raise InputError(
                f"{self.manifest.run_dir} was created with other settings or files: {name}{others}: {'; '.join(differing)}; "
                "choose another run_dir, or pass --rerun_changed to run these stages again"
            )

    def run(self) -> None:
        """Run every stage that is not done; with ``launch.parallel``, scoring and the control in parallel with self-play.

        Raises:
            StageFailed: a program ended with a nonzero exit code; programs in parallel with it have been stopped.
        """
        self.cluster.open()
        with self.view, self.runner.trackers:
            if self.parallel:
                self._run_chains()
            else:
                for stage in self.stages:
                    self._run_stage(stage)

    def _run_chains(self) -> None:
        # Self-play is one chain, what may run beside it the other; each keeps the order of the stages.
        chains = [[stage for stage in self.stages if stage.kind.can_run_beside is beside] for beside in (False, True)]
        threads = [threading.Thread(target=self._run_chain, args=(chain,)) for chain in chains]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a timeout would block signal handlers
                thread.join(timeout=0.2)
        if self._failure is not None:
            raise self._failure

    def _run_chain(self, chain: list[Stage]) -> None:
        try:
            for stage in chain:
                if not self._wait_for((*stage.needs, *self._decisions_before(stage))):
                    return
                self._run_stage(stage)
                with self._turn:
                    self._unfinished.remove(stage.name)
                    self._turn.notify_all()
        except BaseException as failure:  # run() raises it again in the main thread
            self._stop(failure)

    def _run_stage(self, stage: Stage) -> None:
        """Run a stage, unless the run has stopped before its iteration; after an evaluation, apply the stop rule."""
        stopped = self.manifest.stopped
        if stopped is not None and stage.iteration is not None and stage.iteration > stopped["iteration"]:
            return
        self.runner.run(stage)
        if stage.scores is None or stage.scores.role != "policy" or stage.iteration is None:
            return
        from spin.alignment.pipeline.stop_rule import stop_of

        found = stop_of(self.config, stage.iteration)
        if found is not None:
            self.manifest.stop_run(dataclasses.asdict(found))
            self.view.tell(
                f"the run stops after iteration {found.iteration}: {found.reason}; the best model is {found.best}. To go on, "
                "run again with --stop.when=never"
            )

    def _decisions_before(self, stage: Stage) -> list[str]:
        """Return the evaluation that decides whether the iteration of a stage is run, in a run with a stop rule."""
        if self.config.stop.when == "never" or not stage.iteration or stage.scores is not None:
            return []
        return [f"iter{stage.iteration - 1}/evaluate"]

    def _wait_for(self, needs: tuple[str, ...]) -> bool:
        """Wait until these stages are finished; return False if the run has failed in the meantime."""
        with self._turn:
            self._turn.wait_for(lambda: self._failure is not None or self._unfinished.isdisjoint(needs))
            return self._failure is None

    def interrupt(self) -> None:
        """End every child; both chains then stop."""
        self._stop(KeyboardInterrupt())

    def _stop(self, failure: BaseException) -> None:
        with self._turn:
            self._failure = self._failure or failure
            self._turn.notify_all()
        self.cluster.stop()


def run_stages(
    config: RunConfig,
    rerun_changed: bool,
    begin: Callable[[RunConfig], Any],
    finish: Callable[[RunConfig], Any],
    is_hurried: Callable[[], bool] = lambda: False,
) -> int:
    """Run a checked configuration; return the exit code.

    ``begin`` is called before the first stage and ``finish`` after the last one, both with the run directory locked. Once
    ``is_hurried()``, programs that are being ended are killed at once.
    """
    import yaml

    from spin.alignment.core.files import remove_all_leftovers, write_text_atomic
    from spin.alignment.pipeline.lock import run_lock
    from spin.alignment.pipeline.manifest import set_damaged_aside
    from spin.alignment.pipeline.stages import make_stages

    run_dir = Path(config.run_dir)
    with run_lock(run_dir):
        for folder in (run_dir, *(path for path in run_dir.iterdir() if path.is_dir())):
            remove_all_leftovers(folder)
        set_damaged_aside(run_dir)
        config = with_pinned_date(config)
        pipeline = Pipeline(config, make_stages(config), rerun_changed)
        pipeline.cluster.is_hurried = is_hurried
        pipeline.refuse_changes()
        pipeline.manifest.stop_run(None)  # decided again, by the rule of this configuration
        write_text_atomic(run_dir / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
        begin(config)
        try:
            pipeline.run()
        except StageFailed as failure:
            return explain(failure)
        except KeyboardInterrupt:
            pipeline.interrupt()
            raise
        finally:
            pipeline.cluster.close()
        finish(config)
    return EXIT_DONE


def secrets_of(stages: Sequence[Stage]) -> dict[str, str]:
    """Return the environment variables with the secrets of all stages.

    Raises:
        InputError: two stages have different ones.
    """
    found: dict[str, str] = {}
    for stage in stages:
        for name, value in stage.secrets.items():
            if found.setdefault(name, value) != value:
                raise InputError(f"{stage.name} has another hub_token than the stages before it: give a single one")
    return found


def with_pinned_date(config: RunConfig) -> RunConfig:
    """Return a configuration with the date that chat templates see: of a run that goes on, the day it was first started on.

    Without a chat template that has the date, nothing is added.
    """
    from spin.alignment.core.config import load_yaml
    from spin.alignment.data.template_date import template_has_date, today
    from spin.alignment.models.folder import model_folder

    teacher = (config.weigh or {}).get("model_plus")
    models = [(config.model, config.model_revision)]
    models += [(str(teacher), (config.weigh or {}).get("revision_plus"))] if teacher else []
    if config.template_date is not None or not any(template_has_date(model_folder(*model)) for model in models):
        return config
    try:
        recorded = load_yaml(Path(config.run_dir) / "run.yaml").get("template_date")
    except InputError:  # a new run, or one that was killed while it wrote the file
        recorded = None
    return dataclasses.replace(config, template_date=str(recorded or today().isoformat()))


def explain(failure: StageFailed) -> int:
    """Report which stage failed and why; return the exit code of the run."""
    code = failure.code if failure.code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED) else EXIT_INTERNAL_ERROR
    reason = {EXIT_BAD_INPUT: "its input is bad, see the sentence above", EXIT_INTERRUPTED: "it was interrupted"}
    said = failure.reason or reason.get(code, f"its program failed ({describe_code(failure.code)})")
    say_error(f"error: {failure.stage} stopped: {said}; log: {failure.log}; run again to resume")
    return code


def describe_code(code: int) -> str:
    """Return what an exit code of a program means; negative ones are signals."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the kernel does when memory runs out"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
