"""The base of all stages that train a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.files import read_json
from spin.alignment.core.secrets import secret_variables, without_secrets
from spin.alignment.models.folder import model_files
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.stages.base import Model, Source, Stage, StageKind
from spin.alignment.pipeline.stages.sources import function_sources, model_source
from spin.alignment.pipeline.tracked_run import tracker_values
from spin.alignment.training.live_step import read_live_step

if TYPE_CHECKING:
    from spin.alignment.training.program import TrainingProgram
    from spin.alignment.training.settings import Settings


class TrainingKind(StageKind):
    """A training: its program reads a YAML file, writes ``checkpoint/`` and logs ``metrics.json``, which is copied next to it."""

    spread = "group"
    result_suffix = ".safetensors"

    def stage(
        self,
        config: RunConfig,
        name: str,
        values: dict[str, Any],
        sources: Sequence[Source],
        model: Model,
        needs: tuple[str, ...] = (),
    ) -> Stage:
        """Return the stage that trains ``model`` with the settings ``values``."""
        checkpoint, launch = model.folder / "checkpoint", config.launch
        secrets, values = secret_variables(values), without_secrets(values)
        recorded = {"num_processes": launch.num_processes, "config_file": launch.config_file}
        return Stage(
            kind=self,
            name=name,
            configs=[values],
            settings=values | {"launch": recorded},
            sources=[model_source(values["model_name_or_path"]), *sources, *function_sources(values)],
            outputs=lambda: [*model_files(checkpoint), checkpoint / "metrics.json"],
            folder=checkpoint,
            launch=launch,
            iteration=model.iteration,
            needs=needs,
            makes=model,
            secrets=secrets,
            late=lambda: tracker_values(config, model, values),
        )

    def arguments(self, stage: Stage, config: Any) -> list[str]:
        return [str(config_file(stage))]

    def gpus(self, config: Any) -> int:
        return 0 if config.get("use_cpu") else 1

    def prepare(self, stage: Stage) -> None:
        import yaml

        from spin.alignment.core.files import write_text_atomic

        (values,) = stage.configs
        values = {**values, **stage.late()}
        write_text_atomic(config_file(stage), yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def finish(self, stage: Stage, config: RunConfig) -> None:
        self.restore(stage)

    def restore(self, stage: Stage) -> None:
        from spin.alignment.core.files import write_text_atomic

        metrics = checkpoint_of(stage) / "metrics.json"
        copy, content = config_file(stage).with_name(metrics.name), metrics.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            write_text_atomic(copy, content.decode())

    def suspects(self, stage: Stage, damaged: list[Path]) -> list[Path]:
        """A training takes an existing checkpoint for complete, so all files of a damaged one are moved aside."""
        return stage.outputs()

    def progress(self, stage: Stage) -> str:
        return training_progress(checkpoint_of(stage))

    def seconds_left(self, stage: Stage) -> float | None:
        live = read_live_step(checkpoint_of(stage))
        return None if live is None or live.has_ended else live.seconds_left

    def numbers(self, stage: Stage, seconds: float) -> dict[str, float]:
        metrics = read_json(checkpoint_of(stage) / "metrics.json")
        tokens = metrics.get("accounting", {}).get("trained", {}).get("tokens", 0)
        rewards = {name: value for name, value in metrics["final"].items() if name.startswith("rewards/")}
        return {"train_loss": metrics["train_loss"], "tokens_per_second": tokens / seconds, **rewards}

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        from spin.alignment.pipeline.data_checks import model_problems

        return model_problems(checkpoint_of(stage))


def training_progress(folder: Path) -> str:
    """Return the live step of a training running in a folder; of one that was ended, where that was and what it resumes from."""
    live, saved = read_live_step(folder), last_checkpoint(folder)
    if live is not None and not live.has_ended:
        return live.describe_with_time()
    ended = [] if live is None else [f"ended at step {live.step:,} of {live.steps:,}"]
    return ", ".join([*ended, *([f"checkpoint at step {saved:,}"] if saved else [])])


def last_checkpoint(folder: Path) -> int:
    """Return the step of the last checkpoint of a training in its output folder; 0 if it has none."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return max((int(name[1]) for name in found if name), default=0)


def check_training(program: TrainingProgram, config: RunConfig, values: Mapping[str, Any], where: str) -> Settings:
    """Check the settings of a training as its program will, on the layers of the model that the run starts from.

    Raises:
        InputError: naming the key and ``where`` it stands.
    """
    from dataclasses import replace

    from spin.alignment.training.check_settings import check_model_settings, checked_settings

    # The models of later stages do not exist yet, so their paths are not checked here.
    values = {**values, "model_name_or_path": "opponent"}
    settings = checked_settings(program, values, where, config.launch.num_processes)
    check_model_settings(
        replace(settings.model, model_name_or_path=config.model, model_revision=config.model_revision), where
    )
    return settings


def checkpoint_of(stage: Stage) -> Path:
    """Return the folder that a training saves its model in."""
    assert stage.makes is not None
    return stage.makes.folder / "checkpoint"


def config_file(stage: Stage) -> Path:
    """Return the YAML file that a training is started with."""
    return checkpoint_of(stage).with_name("train.yaml")
