"""Which model each trained model starts from, plays against and learns from."""

from __future__ import annotations

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.stages import make_stages
from spin.alignment.pipeline.stages.base import portable
from spin.alignment.pipeline.stages.training import checkpoint_of


def lineage(config: RunConfig) -> list[tuple[str, str, str, str]]:
    """Return (model made, starts from, opponent, data) for every trained model of the run."""
    rows = []
    for stage in make_stages(config):
        if stage.makes is not None:
            model = stage.makes
            rows.append((str(checkpoint_of(stage)), model.starts_from, model.opponent, model.data))
    return [tuple(portable(cell, config.run_dir).replace("RUN/", "") for cell in row) for row in rows]  # type: ignore[misc]
