"""``online/train``: the policy trained step by step on its own labelled responses, in place of the iterations."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import online_values
from spin.alignment.pipeline.stages.base import Model, Stage
from spin.alignment.pipeline.stages.sources import data_source, needs_ground_truth, scorer_sources
from spin.alignment.pipeline.stages.training import TrainingKind, check_training


class Online(TrainingKind):
    program = "run_online.py"

    def at_end(self, config: RunConfig) -> list[Stage]:
        if config.online is None:
            return []
        values, data = (
            online_values(
                config,
            ),
            config.data,
        )
        sources = [data_source(*data.played()), *scorer_sources(values)]
        if "eval_prompts" in values:
            sources.append(data_source(data.test, data.test_split))
        model = Model(
            name="online",
            role="policy",
            folder=Path(config.run_dir) / "online",
            starts_from=config.start_model,
            opponent="its own past",
            data=" ".join(data.played()),
        )
        return [self.stage(config, "online/train", values, sources, model)]

    def check_settings(self, config: RunConfig, source: str) -> None:
        if config.online is None:
            return
        from spin.alignment.training.online.run import OnlineTraining

        check_training(OnlineTraining(), config, online_values(config), f"the section 'online' of {source}")

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        if config.online is None:
            return {}
        return {config.data.played(): needs_ground_truth(config.online, "best_vs_worst")}
