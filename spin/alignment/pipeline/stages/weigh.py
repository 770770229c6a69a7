"""``iterT/weigh``: token weights for the pairs of an iteration."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import weights_config, weights_values
from spin.alignment.pipeline.stages.base import Stage, StageKind
from spin.alignment.pipeline.stages.sources import function_sources, model_source, pair_sources
from spin.alignment.token_weights.config import WeightsConfig


class Weigh(StageKind):
    program = "estimate_weights.py"
    spread = "group"

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        if config.weigh is None:
            return []
        values = weights_values(config, iteration)
        models = [values[key] for key in ("model_plus", "model_minus", "tokenizer") if values.get(key)]
        weights, page = Path(values["output_dir"]), Path(values["page"])
        return [
            Stage(
                kind=self,
                name=f"iter{iteration}/weigh",
                configs=[weights_config(config, iteration)],
                settings=values,
                sources=[*map(model_source, models), *pair_sources([values["input_dir"]]), *function_sources(values)],
                outputs=lambda: [
                    *sorted(weights.glob("*_prefs-*.parquet")),
                    *sorted(weights.glob("*.weights.json")),
                    page,
                ],
                folder=weights,
                launch=config.launch,
                iteration=iteration,
            )
        ]

    def gpus(self, config: WeightsConfig) -> int:
        from spin.alignment.methods.weightings import find_weighting

        return int(find_weighting(config.weighting).needs_models)

    def check_settings(self, config: RunConfig, source: str) -> None:
        """Check the flags, and the teacher as far as possible without loading its weights."""
        if config.weigh is None:
            return
        from spin.alignment.methods.weightings import Compares, find_weighting
        from spin.alignment.token_weights.judges import check_teacher

        weights = weights_config(config, 0)
        if find_weighting(weights.weighting).compares is Compares.TEACHER:
            check_teacher(weights, config.model)

    def problems(self, stage: Stage, config: RunConfig) -> list[str]:
        """Token ids are not decoded again: the stage copies those of the pairs, which are checked there."""
        from spin.alignment.pipeline.data_checks import data_problems

        assert stage.folder is not None
        return data_problems(stage.folder, None)[1]
