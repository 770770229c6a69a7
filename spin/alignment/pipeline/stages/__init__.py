"""The stages of a run. Each kind has one file and one line here, in the order of the stages within an iteration."""

from __future__ import annotations

from collections.abc import Iterable

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.stages.base import Model, Source, Stage, StageKind
from spin.alignment.pipeline.stages.control import Control
from spin.alignment.pipeline.stages.convert import Convert
from spin.alignment.pipeline.stages.evaluate import Evaluate
from spin.alignment.pipeline.stages.generate import Generate
from spin.alignment.pipeline.stages.initial import Initial
from spin.alignment.pipeline.stages.online import Online
from spin.alignment.pipeline.stages.rejection_sampling import Sample, Select
from spin.alignment.pipeline.stages.score_models import ScoreModels
from spin.alignment.pipeline.stages.sft import Sft
from spin.alignment.pipeline.stages.train import Train
from spin.alignment.pipeline.stages.training import TrainingKind
from spin.alignment.pipeline.stages.weigh import Weigh

KINDS: dict[str, StageKind] = {
    "sft": Sft(),
    "sample": Sample(),
    "select": Select(),
    "control": Control(),
    "initial": Initial(),
    "generate": Generate(),
    "convert": Convert(),
    "score_models": ScoreModels(),
    "weigh": Weigh(),
    "train": Train(),
    "online": Online(),
    "evaluate": Evaluate(),
}


def make_stages(config: RunConfig) -> list[Stage]:
    """Return all stages of a run in an order that respects their dependencies."""
    kinds = list(KINDS.values())
    stages = _with_followers(config, (kind.at_start(config) for kind in kinds))
    for iteration in config.self_play_iterations:
        stages += _with_followers(config, (kind.in_iteration(config, iteration) for kind in kinds))
    return stages + _with_followers(config, (kind.at_end(config) for kind in kinds))


def _with_followers(config: RunConfig, groups: Iterable[list[Stage]]) -> list[Stage]:
    """Insert the stages that follow a training, such as its evaluation, directly after the group."""
    stages: list[Stage] = []
    for group in groups:
        trained = [stage for stage in group if stage.makes is not None]
        stages += group
        stages += [item for stage in trained for kind in KINDS.values() for item in kind.after_training(config, stage)]
    return stages


def models_of(stages: Iterable[Stage]) -> list[Model]:
    """Return the models that stages train or score, each once: the start first, then the control."""
    models = {model.name: model for stage in stages if (model := stage.makes or stage.scores) is not None}
    first = {"start": 0, "control": 1}
    return sorted(models.values(), key=lambda model: first.get(model.role, len(first)))


__all__ = ["KINDS", "Model", "Source", "Stage", "StageKind", "TrainingKind", "make_stages", "models_of"]
