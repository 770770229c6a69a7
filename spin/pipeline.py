"""``spin run``: all iterations of self-play in one resumable command.

Each stage is a process of its own. A stage is skipped when its record in ``manifest.json`` says that it is done, its inputs
(settings and file contents) are unchanged and its outputs are intact; killed anywhere and started again, the run goes on.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from spin.alignment.errors import InputError
from spin.programs import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, is_help

if TYPE_CHECKING:
    from spin.alignment.manifest import StageRecord
    from spin.alignment.run_config import RunConfig
    from spin.alignment.stages import Stage

USAGE = """usage: spin run CONFIG.yaml [--key=value ...] [--rerun_changed]

Runs SFT (when asked for), then generate, convert, train and evaluate for every iteration. Run it again to go on after an
interruption. Dots reach into sections: --train.beta=0.5. With --rerun_changed, finished stages whose settings or
input files have changed are made again, and their old output is kept under RUN/replaced/. See docs/pipeline.md."""


class StageFailed(Exception):
    """A stage's program ended with another code than 0."""

    def __init__(self, stage: str, code: int, log: Path) -> None:
        super().__init__(stage)
        self.stage, self.code, self.log = stage, code, log


class Pipeline:
    """Runs the stages of one configuration into its run directory, which it holds locked meanwhile."""

    def __init__(self, config: RunConfig, stages: list[Stage], rerun_changed: bool = False) -> None:
        from spin.alignment.manifest import RunManifest
        from spin.alignment.processes import ChildPrograms

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
            print(f"==> {stage.name}: done already", flush=True)
            return
        if record is not None and record.inputs != inputs:
            self._move_aside(stage, [folder for folder in stage.folders if folder.is_dir()], "its inputs changed")
        elif record is not None and record.state == "done":
            self._move_aside(stage, self._suspect_files(stage), "files of its output were changed or removed")
        print(f"==> {stage.name}: {'going on' if self._is_partial(record, inputs) else 'starting'}", flush=True)
        self.manifest.start(stage.name, inputs)
        started = time.monotonic()
        try:
            self._start_programs(stage)
        except BaseException:
            self.manifest.stop(stage.name, time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        self.manifest.finish(stage.name, stage.outputs(), seconds)
        print(f"==> {stage.name}: done in {seconds:.0f} s", flush=True)

    @staticmethod
    def _is_partial(record: StageRecord | None, inputs: dict[str, Any]) -> bool:
        return record is not None and record.inputs == inputs and record.state != "done"

    def _start_programs(self, stage: Stage) -> None:
        import yaml

        from spin.alignment.shards import write_text_atomic
        from spin.alignment.stages import check_lineage, missing_outputs

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
            print(f"==> {stage.name}: {reason}; the old output is kept in {kept}", flush=True)


def check_before_start(config: RunConfig, source: str) -> None:
    """Check every setting of every program, the data and the tokenizer, before any process starts.

    Raises:
        InputError: what is wrong, with the section or file it stands in.
    """
    from spin import convert_data, evaluate_model, generate
    from spin.alignment.model_utils import check_model_path
    from spin.alignment.pairing import PAIRINGS, check_num_samples
    from spin.alignment.run_config import flags

    managed = ["--model", config.model, "--input_dir", config.data.train, "--output_dir", config.run_dir]
    sampling = generate.make_parser().parse_args([*managed, *flags(config.generate)])
    generate.check_options(sampling)
    options = convert_data.make_parser().parse_args([*managed[2:], *flags(config.convert)])
    convert_data.check_flags(options)
    if config.online is None:
        check_num_samples(options.pairing, PAIRINGS[options.pairing], sampling.num_samples)
    evaluation = evaluate_model.make_parser().parse_args(
        [*managed[:4], "--output_file", config.run_dir, *flags(config.evaluate)]
    )
    evaluate_model.check_options(evaluation)
    check_model_path(config.model, needs_weights=not (config.sft or {}).get("init_from_config", False))
    check_training_settings(config, source, options.pairing)
    check_weighing(config)
    check_data(config, sampling)


def check_training_settings(config: RunConfig, source: str, pairing: str = "ground_truth") -> None:
    """Build the settings of every training of the run, as its program will."""
    from spin.alignment.labelling import check_loss
    from spin.alignment.run_config import SCORERS_OF_RUN
    from spin.alignment.trainer import SPINConfig
    from spin.alignment.training_run import read_settings

    # The models of later stages do not exist yet, so their paths are not looked at here.
    path = {"model_name_or_path": "opponent"}
    for name in ("sft", "control"):
        if getattr(config, name) is not None:
            from spin.alignment.sft import SFTArguments

            read_settings(config.sft_values(name) | path, f"the section '{name}' of {source}", SFTArguments)
    if config.online is not None:
        from spin.alignment.online.config import OnlineConfig
        from spin.run_online import check_settings

        where = f"the section 'online' of {source}"
        check_settings(read_settings(config.online_values() | path, where, OnlineConfig))
        return
    for iteration in range(config.iterations):
        where = f"the section 'train' of {source} (iteration {iteration})"
        check_loss(pairing, read_settings(config.train_values(iteration) | path, where, SPINConfig).arguments.loss_type)
        for name in SCORERS_OF_RUN.values() if config.trains_scorers else ():
            where = f"the section 'weigh.train' of {source} (iteration {iteration}, {name})"
            scorer = read_settings(config.scorer_values(iteration, name) | path, where, SPINConfig)
            check_loss(pairing, scorer.arguments.loss_type)


def check_weighing(config: RunConfig) -> None:
    """Check the flags of the section ``weigh``, and the teacher as far as that goes without its weights."""
    if config.weigh is None:
        return
    from spin import estimate_weights
    from spin.alignment.run_config import flags

    options = estimate_weights.make_parser().parse_args(flags(config.weigh_values(0)))
    estimate_weights.check_options(options)
    if options.weighting == "teacher":
        estimate_weights.check_teacher(options, config.model)


def check_data(config: RunConfig, sampling: Any) -> None:
    """Read the prompts and encode some of them, so that an unusable template shows before hours of training.

    Only SFT, the evaluation and pairings that compare with the ground truth need one.
    """
    from spin.alignment.chat import ChatEncoder, load_tokenizer
    from spin.alignment.data import load_prompts
    from spin.alignment.readers import prompt_turns

    # What the program that reads the prompts is told: run_online.py where it takes the place of generate.py.
    told = {"trust_remote_code": sampling.trust_remote_code, "system": sampling.system}
    told = {name: (config.online or {}).get(name, value) for name, value in told.items()}
    tokenizer = load_tokenizer(config.model, config.model_revision, told["trust_remote_code"])
    encoder = ChatEncoder(tokenizer, told["system"])
    for (path, split), truth_required in data_sources(config).items():
        prompts = load_prompts(path, split, truth_required)
        for row in prompts.select(range(min(100, len(prompts)))):
            try:
                encoder.prompt_ids(prompt_turns(row["chosen"]))
            except InputError as error:
                raise InputError(f"{path} [{split}], prompt {row['prompt_id']}: {error}") from error


def data_sources(config: RunConfig) -> dict[tuple[str, str], bool]:
    """Return every data set and split of a run, and whether its rows must have their ground truth."""
    from spin.alignment.pairing import needs_truth
    from spin.alignment.scoring import needs_reference

    data = config.data
    if config.online is None:
        name, scorer = config.convert.get("pairing", "ground_truth"), config.convert.get("scorer")
    else:
        name, scorer = config.online.get("pairing", "best_vs_worst"), config.online.get("scorer")
    required = needs_truth(name) or (scorer is not None and needs_reference(scorer))
    sources = {data.played(iteration): required for iteration in range(config.iterations)}
    if config.sft is not None or config.control is not None:
        sources[data.train, data.train_split] = True
    if data.test:
        sources[data.test, data.test_split] = True
    return sources


def check_run_dir(run_dir: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    from spin.alignment.manifest import MANIFEST_NAME

    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir {run_dir} is a file: choose a folder")
    known = {MANIFEST_NAME, ".lock", "run.yaml"}
    if run_dir.is_dir() and not (run_dir / MANIFEST_NAME).exists():
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in known)
        if foreign:
            raise InputError(f"run_dir {run_dir} holds {foreign[0]} but no run of this program: choose an empty folder")


def run(config: RunConfig, source: str, rerun_changed: bool) -> int:
    """Run a checked configuration; return the exit code."""
    import yaml

    from spin.alignment.manifest import RunLock
    from spin.alignment.report import show_lineage, write_report
    from spin.alignment.shards import write_text_atomic
    from spin.alignment.stages import make_stages

    run_dir = Path(config.run_dir)
    check_run_dir(run_dir)
    check_before_start(config, source)
    with RunLock(run_dir):
        pipeline = Pipeline(config, make_stages(config), rerun_changed)
        pipeline.refuse_changes()
        pipeline.manifest.save()
        write_text_atomic(run_dir / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
        show_lineage(config)
        try:
            pipeline.run()
        except StageFailed as failure:
            return explain(failure)
        except KeyboardInterrupt:
            pipeline.interrupt()
            raise
        write_report(config)
    return EXIT_DONE


def explain(failure: StageFailed) -> int:
    """Say which stage ended how; return the exit code of the run."""
    import sys

    code = failure.code if failure.code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED) else EXIT_FAULT
    reason = {EXIT_BAD_INPUT: "its input is bad, see the sentence above", EXIT_INTERRUPTED: "it was interrupted"}
    said = reason.get(code, f"its program failed (exit code {failure.code})")
    print(f"error: {failure.stage} stopped: {said}; log: {failure.log}; run again to go on", file=sys.stderr)
    return code


def main(arguments: Sequence[str]) -> int:
    if is_help(arguments, USAGE):
        return EXIT_DONE
    from spin.alignment.run_config import load_run_config

    rerun_changed = "--rerun_changed" in arguments
    config = load_run_config(arguments[0], [item for item in arguments[1:] if item != "--rerun_changed"])
    signal.signal(signal.SIGTERM, _interrupt)
    return run(config, arguments[0], rerun_changed)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
