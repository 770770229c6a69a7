"""The shipped configurations of online training and of the demos pass the checks that come before the first stage."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["online_gsm8k", "online_gsm8k_7b", "online_sppo_math"])
def test_the_shipped_configurations_are_valid(name, tiny_model):
    from spin.alignment.core.config import load_config
    from spin.alignment.training.online.config import OnlineConfig
    from spin.alignment.training.online.run import check_settings
    from spin.alignment.training.settings import read_settings

    # bf16 needs a device that has it, which a test machine may not be.
    values = load_config(
        f"configs/{name}.yaml", [f"--model_name_or_path={tiny_model}", "--bf16=false", "--use_cpu=true"]
    )
    settings = read_settings(values, name, OnlineConfig)
    check_settings(settings)


@pytest.mark.parametrize("name", ["demo_online", "demo_sppo", "demo_wspin", "gsm8k_small_online", "gsm8k_small_sppo"])
def test_the_shipped_runs_are_valid(name):
    from spin.alignment.pipeline.config import load_run_config
    from spin.alignment.pipeline.preflight import check_settings
    from spin.alignment.pipeline.stages import KINDS, make_stages

    config = load_run_config(f"configs/{name}.yaml")
    check_settings(config, name)
    assert make_stages(config)[-1].kind is KINDS["evaluate"]
