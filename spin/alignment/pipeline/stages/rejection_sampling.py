"""``control/generate`` and ``control/select``: responses of the start model, and those of them that the control is trained on."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.pairs.config import SelectConfig
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import sample_config, select_config
from spin.alignment.pipeline.stages.base import Source, Stage, StageKind
from spin.alignment.pipeline.stages.generate import Generate
from spin.alignment.pipeline.stages.sources import needs_ground_truth_to_score, scorer_gpus, scorer_sources


class Sample(Generate):
    can_run_beside = True

    def at_start(self, config: RunConfig) -> list[Stage]:
        if config.select is None:
            return []
        sampled, section = sample_config(config), config.sample_section
        return [self.stage(config, "control/generate", [sampled], section, needs=("sft/train",))]

    def in_iteration(self, config: RunConfig, iteration: int) -> list[Stage]:
        return []

    def check_settings(self, config: RunConfig, source: str) -> None:
        if config.select is not None:
            sample_config(config).check_files()

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        if config.select is None:
            return {}
        return {config.data.played(): needs_ground_truth_to_score(config.select)}


class Select(StageKind):
    program = "select_responses.py"
    can_run_beside = True

    def at_start(self, config: RunConfig) -> list[Stage]:
        if config.select is None:
            return []
        selection = select_config(config)
        generated, folder = Path(selection.input_dir), Path(selection.output_dir)
        return [
            Stage(
                kind=self,
                name="control/select",
                configs=[selection],
                settings={key: value for key, value in config.select.items() if key != "generate"},
                sources=[
                    Source(str(generated), lambda: sorted(generated.glob("*.parquet"))),
                    *scorer_sources(config.select),
                ],
                outputs=lambda: [*sorted(folder.glob("*.parquet")), *sorted(folder.glob("*.counts.json"))],
                folder=folder,
                needs=("control/generate",),
            )
        ]

    def gpus(self, config: SelectConfig) -> int:
        return scorer_gpus(config)

    def check_settings(self, config: RunConfig, source: str) -> None:
        from spin.alignment.rewards import check_scorer

        if config.select is None:
            return
        if config.control is None:
            raise InputError(
                f"the section 'select' of {source} selects what the control is trained on, but there is no section 'control': "
                "add it, or remove 'select'"
            )
        check_scorer(select_config(config).scorer_settings)
