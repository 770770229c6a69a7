"""``iterT/train``: the policy of the next iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import train_values
from spin.alignment.pipeline.stages.base import Model, Stage
from spin.alignment.pipeline.stages.sources import pair_sources
from spin.alignment.pipeline.stages.training import TrainingKind, check_training


class Train(TrainingKind):
    program = "run_spin.py"

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        opponent, folders = config.opponent(iteration), config.train_folders(iteration)
        model = Model(
            name=f"iter{iteration}",
            role="policy",
            folder=config.iteration_dir(iteration),
            iteration=iteration,
            starts_from=opponent,
            opponent=opponent,
            data=" + ".join(folders),
        )
        values = train_values(config, iteration)
        return [self.stage(config, f"iter{iteration}/train", values, pair_sources(folders), model)]

    def check_settings(self, config: RunConfig, source: str) -> None:
        for iteration in config.self_play_iterations:
            where, values = f"the section 'train' of {source} (iteration {iteration})", train_values(config, iteration)
            check_spin_settings(config, values, where)
            check_system(config, values, where)


def check_system(config: RunConfig, values: Mapping[str, Any], where: str) -> None:
    """Check that the pairs will be trained with the treatment of system turns that they are generated with.

    Raises:
        InputError: it differs, and the stored ids are to be trained on.
    """
    generated, trained = (section.get("system", "keep") for section in (config.generate, values))
    if generated != trained and not values.get("retokenize"):
        raise InputError(
            f"'system' in {where} is {trained}, but {generated} in the section 'generate', which makes other prompts: set both "
            "to the same"
        )


def check_spin_settings(config: RunConfig, values: Mapping[str, Any], where: str) -> None:
    """Check settings of run_spin.py, and that the pairs will have the labels that the loss reads.

    Raises:
        InputError: a setting is unknown or out of range, or the pairing does not write what the loss reads.
    """
    from spin.alignment.pairs.annotate import check_loss
    from spin.alignment.training.preference import PreferenceTraining

    settings = check_training(PreferenceTraining(), config, values, where)
    check_loss(config.convert.get("pairing", "ground_truth"), settings.arguments.loss_type)
