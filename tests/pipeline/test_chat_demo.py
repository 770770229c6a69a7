"""The chat demo on its real model: everything that can be checked before it is trained."""

from __future__ import annotations

from spin.alignment.core.assets import asset
from spin.alignment.data.chat_encoder import load_encoder
from spin.alignment.data.rows import load_prompts
from spin.alignment.data.turns import prompt_turns
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.preflight import check_before_start
from tests.helpers import REPOSITORY


def demo_config(model, tmp_path):
    settings = [f"--model={model}", f"--run_dir={tmp_path / 'run'}"]
    return load_run_config(asset("configs/demo_chat.yaml"), settings)


def test_the_configuration_passes_every_check(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    check_before_start(demo_config(smollm2, tmp_path), "demo_chat.yaml")


def test_no_prompt_is_left_out(smollm2, tmp_path, monkeypatch):
    """A prompt longer than max_prompt_length would be skipped by both trainings."""
    monkeypatch.chdir(REPOSITORY)
    config = demo_config(smollm2, tmp_path)
    encoder = load_encoder(str(smollm2))
    prompts = load_prompts(config.data.train, config.data.train_split, ground_truth_required=False)
    longest = max(len(encoder.prompt_ids(prompt_turns(row["chosen"]))) for row in prompts)
    for section in (config.online, config.control):
        assert longest <= section["max_prompt_length"] <= section["max_length"] - 60


def test_the_arms_get_the_same_number_of_responses(tmp_path):
    config = demo_config("anywhere", tmp_path)
    prompts = (REPOSITORY / config.data.train / "train.jsonl").read_text().count("\n")
    online, sampled = config.online, config.sample_section
    assert (
        online["max_steps"] * online["per_device_train_batch_size"] * online["num_samples"]
        == prompts * sampled["num_samples"]
    )
    assert online["max_new_tokens"] == sampled["max_new_tokens"] == config.evaluate["max_new_tokens"]
    assert online["learning_rate"] == config.control["learning_rate"]
    assert online["scorer"] == config.select["scorer"] == config.evaluate["metric"]
