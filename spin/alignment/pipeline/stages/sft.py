"""``sft/train``: the SFT model that self-play starts from, if the run trains it itself."""

from __future__ import annotations

from pathlib import Path

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.program_settings import sft_data, sft_values
from spin.alignment.pipeline.stages.base import Model, Role, Stage
from spin.alignment.pipeline.stages.sources import data_source
from spin.alignment.pipeline.stages.training import TrainingKind, check_training


class Sft(TrainingKind):
    program = "run_sft.py"
    # The section of the configuration, and the name and role of the model in the report.
    section = "sft"
    row = "sft"
    role: Role = "start"

    def needs(self, config: RunConfig) -> tuple[str, ...]:
        """Return the stages that the training waits for."""
        return ()

    def at_start(self, config: RunConfig) -> list[Stage]:
        section = getattr(config, self.section)
        if section is None:
            return []
        values, (path, split) = sft_values(config, self.section), sft_data(config, self.section)
        model = Model(
            name=self.row,
            role=self.role,
            folder=Path(config.run_dir) / self.section,
            starts_from=values["model_name_or_path"] + (" (random weights)" if section.get("init_from_config") else ""),
            opponent="none (SFT)",
            data=f"{path} [{split}]",
        )
        sources = [data_source(path, split)]
        return [self.stage(config, f"{self.section}/train", values, sources, model, self.needs(config))]

    def check_settings(self, config: RunConfig, source: str) -> None:
        if getattr(config, self.section) is None:
            return
        from spin.alignment.training.sft import SFTTraining

        values = sft_values(config, self.section)
        check_training(SFTTraining(), config, values, f"the section '{self.section}' of {source}")

    def prompts(self, config: RunConfig) -> dict[tuple[str, str], bool]:
        data = config.data
        if getattr(config, self.section) is None or sft_data(config, self.section) != (data.train, data.train_split):
            return {}
        return {(data.train, data.train_split): True}
