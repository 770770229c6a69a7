"""``initial/generate``: responses of the model that iteration 0 starts from, generated once for the losses that read them."""

from __future__ import annotations

from dataclasses import replace

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import INITIAL, SIDES
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.stages.base import Stage
from spin.alignment.pipeline.stages.generate import Generate, generations


class Initial(Generate):
    def at_start(self, config: RunConfig) -> list[Stage]:
        if not config.reads_initial:
            return []
        folder, seed = str(config.initial_dir), config.initial_seed
        configs = [replace(item, output_dir=folder, seed=seed) for item in generations(config, 0)]
        return [self.stage(config, f"{INITIAL}/generate", configs)]

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        return []

    def check_settings(self, config: RunConfig, source: str) -> None:
        """Check that the run can make every response that a loss of it reads.

        Raises:
            InputError: a response that no stage makes, one set of prompts for each iteration, or token weights, which only the
                chosen and the rejected response have.
        """
        from spin.alignment.methods.losses import find_loss

        for iteration in config.self_play_iterations:
            loss_type = str(config.train_values(iteration).get("loss_type", "sigmoid"))
            further = [name for name in find_loss(loss_type).responses if name not in SIDES]
            if not further:
                continue
            reads = f"loss_type {loss_type} reads the initial model's responses"
            if unknown := [name for name in further if name != INITIAL]:
                raise InputError(
                    f"loss_type {loss_type} reads a response '{unknown[0]}', which no stage of a run makes: use run_spin.py"
                )
            if isinstance(config.data.prompts, list):
                raise InputError(
                    f"{reads}, which are generated once for all iterations: name a single data set as data.prompts"
                )
            if config.weigh is not None:
                raise InputError(f"{reads}, which get no token weights: remove the section 'weigh'")

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        return {}
