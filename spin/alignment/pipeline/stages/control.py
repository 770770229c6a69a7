"""``control/train``: SFT continued from the start, on the same data or on its own accepted responses: the baseline."""

from __future__ import annotations

from spin.alignment.pipeline.stages.sft import Sft


class Control(Sft):
    section = "control"
    row = "sft_continued"
    role = "control"
    needs = ("sft/train", "control/select")
    can_run_beside = True
