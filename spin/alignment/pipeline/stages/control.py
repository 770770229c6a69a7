"""``control/train``: SFT continued from the start on the same data, which self-play has to beat."""

from __future__ import annotations

from spin.alignment.pipeline.stages.sft import Sft


class Control(Sft):
    section = "control"
    row = "sft_continued"
    role = "control"
    needs = ("sft/train",)
    can_run_beside = True
