"""The SFT trainer: what it says when it is created."""

from __future__ import annotations

import warnings

from tests.helpers.in_processes import sft_trainer


def test_no_warning_about_the_smoothing_of_trl_which_is_not_used(tiny_model, tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_length": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = sft_trainer(str(tiny_model), values)
    assert trainer.label_smoother.epsilon == 0.1
