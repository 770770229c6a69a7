"""What ``spin run`` knows of scorers: they decide results, may need a ground truth, and online training reads its own prompts."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.pairs.annotate import scorer_record
from spin.alignment.pipeline import preflight
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.manifest import RunManifest
from spin.alignment.pipeline.stages import make_stages
from spin.alignment.rewards import ScorerSettings
from spin.alignment.training.online.config import OnlineConfig
from spin.alignment.training.settings import inputs_record, read_settings
from tests.helpers import char_tokenizer, save_tiny_model
from tests.helpers.chat_templates import GEMMA
from tests.helpers.runs import tiny_run, write_config

ONLINE = {"iterations": None, "generate": None, "train": None, "overrides": None}
OFFLINE = {"iterations": 1, "overrides": None}


def make_config(tmp_path, **changes):
    return load_run_config(write_config(tmp_path / "config.yaml", tiny_run(tmp_path, **changes)))


def scoring_inputs(config):
    """What the stage that scores is made from."""
    stage = next(stage for stage in make_stages(config) if stage.name in ("iter0/convert", "online/train"))
    return stage.inputs(RunManifest(config.run_dir))


def changes_of(config, change):
    before = scoring_inputs(config)
    change()
    return {key for key, value in scoring_inputs(config).items() if value != before[key]}


@pytest.mark.parametrize("place", ["convert", "online"])
def test_a_changed_rule_changes_the_stage(tmp_path, monkeypatch, place):
    module = tmp_path / f"rule_of_{place}.py"
    module.write_text("def score(prompt, response, reference):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module.stem)  # as the checks before the start do
    section = {"pairing": "best_vs_worst", "scorer": f"0.5*{module.stem}:score"}
    config = make_config(tmp_path, **(OFFLINE if place == "convert" else ONLINE), **{place: section})
    changed = changes_of(config, lambda: module.write_text(module.read_text().replace("1.0", "-2.0")))
    assert changed == {f"content of scorer 0.5*{module.stem}:score"}


def test_a_changed_reward_model_changes_the_stage(tmp_path):
    rewards = save_tiny_model(tmp_path / "rewards")
    section = {"pairing": "best_vs_worst", "scorer": "reward_model", "scorer_model": str(rewards)}
    config = make_config(tmp_path, **OFFLINE, convert=section)
    assert changes_of(config, lambda: save_tiny_model(rewards, seed=5)) == {f"content of {rewards}"}


def test_online_prompts_are_tried_as_online_training_reads_them(tmp_path):
    """A template without system role: `system: fold` of the section online reaches the check."""
    config = make_config(tmp_path, **ONLINE, online={"scorer": "length_penalty", "system": "fold"})
    char_tokenizer(("<bos>", "<start_of_turn>", "<end_of_turn>"), GEMMA, bos_token="<bos>").save_pretrained(
        tmp_path / "model"
    )
    turns = [{"role": role, "content": "1+1"} for role in ("system", "user", "assistant")]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    preflight.check_data(config)
    with pytest.raises(InputError, match="system"):
        preflight.check_data(dataclasses.replace(config, online={"scorer": "length_penalty"}))


@pytest.mark.parametrize(
    ("changes", "required"),
    [
        ({**OFFLINE, "convert": {"pairing": "best_vs_worst", "scorer": "math_answer"}}, True),
        ({**OFFLINE, "convert": {"pairing": "best_vs_worst", "scorer": "length_penalty"}}, False),
        ({**ONLINE, "online": {"scorer": "length_penalty+math_answer"}}, True),
        ({**ONLINE, "online": {"scorer": "reward_model"}}, False),
    ],
)
def test_rules_that_compare_need_a_ground_truth_before_anything_starts(tmp_path, changes, required):
    config = make_config(tmp_path, data={"train": "some/data"}, **changes)
    assert preflight.data_sources(config) == {("some/data", "train"): required}


def test_models_that_weigh_are_checked_against_the_pairing(tmp_path):
    weigh = {"weighting": "reverse_dpo", "train": {"loss_type": "sppo"}}
    with pytest.raises(InputError, match="loss_type sppo reads win_probs, which pairing ground_truth does not write"):
        preflight.check_settings(make_config(tmp_path, **OFFLINE, weigh=weigh), "config.yaml")


def test_the_record_of_a_scorer_knows_all_that_decides_its_scores(tmp_path):
    def record(name, **settings):
        return scorer_record(ScorerSettings("reward_model", model=str(save_tiny_model(tmp_path / name)), **settings))

    first = record("first")
    assert record("same") | {"scorer_model": first["scorer_model"]} == first
    folder = save_tiny_model(tmp_path / "other_template")
    char_tokenizer(template=GEMMA).save_pretrained(folder)
    other = scorer_record(ScorerSettings("reward_model", model=str(folder)))
    assert {key for key in first if first[key] != other[key]} == {"scorer_model", "scorer_tokenizer"}
    served = [scorer_record(ScorerSettings("judge", base_url=f"http://{host}/v1")) for host in ("a", "b")]
    assert served[0] != served[1]  # without a name, the judge is what that server serves
    named = [scorer_record(ScorerSettings("judge", "big", base_url=f"http://{host}/v1")) for host in ("a", "b")]
    assert named[0] == named[1]


def test_kept_scores_change_no_training():
    values = {"model_name_or_path": "model", "score_cache": "kept", "scorer": "reward_model", "use_cpu": True}
    values |= {"output_dir": "out", "dataset_mixer": {"data": 1.0}}
    with_cache = read_settings(values, "the configuration", OnlineConfig)
    without = read_settings(values | {"score_cache": None}, "the configuration", OnlineConfig)
    other = read_settings(values | {"scorer": "length_penalty"}, "the configuration", OnlineConfig)
    records = [inputs_record(settings, "hash", "data") for settings in (with_cache, without, other)]
    assert records[0] == records[1] != records[2]
    assert "score_cache" not in records[0] and records[0]["scorer"] == "reward_model"
