"""``control/train``: SFT continued from the start, on the same data or on its own accepted responses: the baseline."""

from __future__ import annotations

from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.stages.sft import Sft


class Control(Sft):
    section = "control"
    row = "sft_continued"
    role = "control"
    can_run_beside = True

    def needs(self, config: RunConfig) -> tuple[str, ...]:
        return ("sft/train",) if config.select is None else ("sft/train", "control/select")
