"""What a stage is, and what its kind declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from spin.alignment.core.flags import to_arguments
from spin.alignment.pipeline.config import LaunchConfig, RunConfig
from spin.alignment.pipeline.manifest import NO_FILES, RunManifest
from spin.alignment.pipeline.stage_program import Spread, StageProgram


@dataclass(frozen=True)
class Source:
    """Files whose content a stage depends on; ``name`` is what the manifest calls them. Without files: a Hub name."""

    name: str
    files: Callable[[], list[Path]]


# The model that self-play starts from; SFT continued from it; a policy trained by self-play; plain SPIN on the data of a policy
# that was trained with token weights; a model used only to compute token weights.
Role = Literal["start", "control", "policy", "unweighted", "scorer"]


@dataclass(frozen=True)
class Model:
    """A model of a run: one row of the report, and of the lineage if the run trains it.

    ``folder`` contains its ``checkpoint/``, ``metrics.json`` and ``eval.json``. ``role`` determines its comparisons.
    """

    name: str
    role: Role
    folder: Path
    iteration: int | None = None
    starts_from: str = ""
    opponent: str = ""
    data: str = ""

    @property
    def is_reported(self) -> bool:
        """Whether it is scored on the held-out prompts and has a row in the report."""
        return self.role != "scorer"


@dataclass(frozen=True)
class Stage:
    """One step of a run, skipped once it is complete: programs that turn sources into outputs.

    ``configs`` holds the settings of each program that is run, one after the other: the dataclass that its command line is
    built from, or the mapping that it reads as YAML. ``settings`` is what the manifest records of them. ``folder`` contains
    partial results, and is moved aside if the inputs have changed. ``needs`` names the stages whose outputs it reads.
    ``makes`` is the model that it trains, ``scores`` the one that it evaluates. ``secrets`` are environment variables that its
    programs need and no file may contain. ``late()`` returns further settings of its programs when the stage starts; they may
    depend on earlier stages, and do not affect the outputs.
    """

    kind: StageKind
    name: str
    configs: Sequence[Any]
    settings: Mapping[str, Any]
    sources: Sequence[Source]
    outputs: Callable[[], list[Path]]
    folder: Path | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    iteration: int | None = None
    needs: tuple[str, ...] = ()
    makes: Model | None = None
    scores: Model | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    late: Callable[[], Mapping[str, Any]] = dict

    @property
    def commands(self) -> list[list[str]]:
        return [self.kind.command(self, config) for config in self.configs]

    def inputs(self, manifest: RunManifest) -> dict[str, Any]:
        """Return what the outputs of the stage depend on: its settings, and the content hash of every source."""
        run_dir = manifest.run_dir
        values = {key: portable(value, run_dir) for key, value in flatten(self.settings).items()}
        for source in self.sources:
            files = source.files()
            values[f"content of {portable(source.name, run_dir)}"] = (
                manifest.content_hashes(files) if files else NO_FILES
            )
        return values


class StageKind:
    """A kind of stage: where its stages are in a run, the program they start, and what is checked before and after.

    A kind overrides the hook that puts its stages into the run, names its ``program`` and the suffix of the files
    that prove it is complete. Everything else has a default.
    """

    program: ClassVar[str]
    # What the processes of the program are to each other, if the stage has several.
    spread: ClassVar[Spread] = "one"
    # At least one output of a complete stage ends with this.
    result_suffix: ClassVar[str] = ".parquet"
    # Self-play does not wait for these stages: with launch.parallel they run in parallel with it.
    can_run_beside: ClassVar[bool] = False

    # Where in a run.

    def at_start(self, config: RunConfig) -> list[Stage]:
        """Return the stages before the first iteration."""
        return []

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        """Return the stages of an iteration."""
        return []

    def at_end(self, config: RunConfig) -> list[Stage]:
        """Return the stages after the last iteration."""
        return []

    def after_training(self, config: RunConfig, stage: Stage) -> list[Stage]:
        """Return the stages that follow a stage that trains a model."""
        return []

    # Before the run.

    def check_settings(self, config: RunConfig, source: str) -> None:
        """Check the settings of all stages of this kind before any process starts; ``source`` is the file that contains them.

        Raises:
            InputError: a setting is unknown, out of range, or conflicts with another.
        """

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        """Return the (data set, split) of the user that stages of this kind read, and whether they need the ground truth."""
        return {}

    # Around a program.

    def arguments(self, stage: Stage, config: Any) -> list[str]:
        """Return the arguments of the program with one of the stage's configs."""
        return to_arguments(config)

    def gpus(self, config: Any) -> int:
        """Return the GPUs that a process of the program needs on a cluster that has GPUs."""
        return 0

    def program_of(self, stage: Stage, config: Any) -> StageProgram:
        """Return the program with one of the stage's configs, and what it needs."""
        launch = stage.launch
        return StageProgram(
            name=self.program,
            arguments=self.arguments(stage, config),
            spread=self.spread,
            processes=launch.num_processes,
            nodes=launch.nodes if self.spread == "group" else 1,
            gpus=self.gpus(config),
            config_file=launch.config_file,
        )

    def command(self, stage: Stage, config: Any) -> list[str]:
        """Return the command of the program with one of the stage's configs, all processes on this machine."""
        return self.program_of(stage, config).command()

    def prepare(self, stage: Stage) -> None:
        """Write the files that the program reads besides its arguments."""

    def finish(self, stage: Stage, config: RunConfig) -> None:
        """Check and complete the outputs of the programs.

        Raises:
            InputError: they are not what the run requires.
        """

    def restore(self, stage: Stage) -> None:
        """Write copies of outputs again, which people and the report read."""

    def missing_outputs(self, stage: Stage) -> list[str]:
        """Return the outputs that are missing although the programs of the stage succeeded."""
        paths = stage.outputs()
        missing = [str(path) for path in paths if not path.is_file()]
        if not any(path.name.endswith(self.result_suffix) for path in paths):
            missing.append(f"{stage.folder}/*{self.result_suffix}")
        return missing

    def suspects(self, stage: Stage, damaged: list[Path]) -> list[Path]:
        """Return the files to move aside if some are damaged, so that the program does not take them for complete output."""
        return damaged

    # For people.

    def progress(self, stage: Stage) -> str:
        """Return the progress of a stage that is not done, in one line or several, from the files that it writes."""
        return ""

    def seconds_left(self, stage: Stage) -> float | None:
        """Return the estimated time that a running stage still takes, from the same files; None if it is not known."""
        return None

    def numbers(self, stage: Stage, seconds: float) -> dict[str, float]:
        """Return what trackers show of a stage that has finished after ``seconds``, by name."""
        return {}

    def examples(self, stage: Stage) -> list[dict[str, str]]:
        """Return a few rows of text for the trackers that have tables: responses of a stage that has finished."""
        return []

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        """Return the problems of the outputs of a completed stage, beyond their content hashes (``spin validate``)."""
        return []


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys; leaves become JSON values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)
    return {key.replace("\n", " "): value for key, value in flat.items()}


def portable(value: Any, run_dir: str | Path) -> Any:
    """Make paths inside the run directory independent of its location, so that two runs can be compared.

    The paths are made from ``run_dir`` as it was given, so its spelling (relative, through a link) does not matter.
    """
    return value.replace(f"{Path(run_dir)}/", "RUN/") if isinstance(value, str) else value
