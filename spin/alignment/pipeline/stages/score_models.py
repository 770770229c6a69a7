"""``iterT/forward`` and ``iterT/reverse``: the models that weigh tokens, where the run trains them (reverse DPO).

The forward model is plain SPIN on the same data: in the report it stands beside the policy that learns from weighted tokens.
"""

from __future__ import annotations

from spin.alignment.pipeline.config import SCORERS_OF_RUN, RunConfig
from spin.alignment.pipeline.stages.base import Model, Stage
from spin.alignment.pipeline.stages.sources import pair_sources
from spin.alignment.pipeline.stages.train import check_spin_settings
from spin.alignment.pipeline.stages.training import TrainingKind


class ScoreModels(TrainingKind):
    program = "run_spin.py"

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        if not config.trains_scorers:
            return []
        return [self._stage(config, iteration, sign) for sign in SCORERS_OF_RUN]

    def _stage(self, config: RunConfig, iteration: int, sign: str) -> Stage:
        name, opponent, folders = SCORERS_OF_RUN[sign], config.opponent(iteration), config.pair_folders(iteration)
        is_plain_spin = sign == "plus"
        model = Model(
            name=f"iter{iteration}_{'spin' if is_plain_spin else name}",
            role="unweighted" if is_plain_spin else "scorer",
            folder=config.iteration_dir(iteration) / name,
            iteration=iteration,
            starts_from=opponent,
            opponent=opponent,
            data=" + ".join(folders) + ("" if is_plain_spin else " (reversed)"),
        )
        values = config.scorer_values(iteration, name)
        return self.stage(config, f"iter{iteration}/{name}", values, pair_sources(folders), model)

    def check_settings(self, config: RunConfig, source: str) -> None:
        for iteration in config.self_play_iterations if config.trains_scorers else ():
            for name in SCORERS_OF_RUN.values():
                where = f"the section 'weigh.train' of {source} (iteration {iteration}, {name})"
                check_spin_settings(config, config.scorer_values(iteration, name), where)
