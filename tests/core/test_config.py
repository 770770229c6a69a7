"""The configuration loader, every shipped file, and the documentation of every key."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spin.alignment.core.config import build, load_config, load_yaml, parse_overrides
from spin.alignment.core.errors import InputError
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.renamed_keys import rename_keys
from tests.helpers import REPOSITORY

CONFIGS = REPOSITORY / "configs"
LAUNCH = [
    "cpu",
    "multi_gpu",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "deepspeed_offload",
    "deepspeed_zero3_cpu",
    "fsdp2",
]
RUNS = ["demo", "zephyr_7b", "spin_70b", "tspin_zephyr_7b"]
PAPER = ["config", "config_iter1", "config_iter2", "config_iter3"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_iterations_are_complete_settings(name, tiny_model, tmp_path):
    from spin.alignment.training.settings import read_settings
    from spin.alignment.training.trainer import SPINConfig

    values = load_config(CONFIGS / f"{name}.yaml")
    on_this_machine = {
        "model_name_or_path": str(tiny_model),
        "output_dir": str(tmp_path),
        "bf16": False,
        "use_cpu": True,
    }
    settings = read_settings(values | on_this_machine, name, SPINConfig)
    assert settings.arguments.optim == "rmsprop"
    assert settings.arguments.warmup_steps == 0.1
    assert settings.arguments.per_device_train_batch_size * 8 == 64
    assert settings.data.max_length == 1024


@pytest.mark.parametrize("name", RUNS)
def test_every_run_configuration_makes_a_plan(name, monkeypatch):
    from spin.alignment.pipeline.config import load_run_config
    from spin.alignment.pipeline.stages import make_stages

    monkeypatch.chdir(REPOSITORY)
    config = load_run_config(CONFIGS / f"{name}.yaml")
    names = [stage.name for stage in make_stages(config)]
    assert f"iter{config.iterations - 1}/train" in names


def test_the_configuration_for_an_own_model_names_no_model(monkeypatch):
    from spin.alignment.pipeline.config import load_run_config
    from spin.alignment.pipeline.stages import make_stages

    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError, match="lacks the key 'model': add it"):
        load_run_config(CONFIGS / "own_model.yaml")
    with pytest.raises(InputError, match="lacks the key 'data'"):
        load_run_config(CONFIGS / "own_model.yaml", ["--model=mine"])
    own = ["--model=mine", "--data.train=data/iter0", "--data.test=data/iter0"]
    names = [stage.name for stage in make_stages(load_run_config(CONFIGS / "own_model.yaml", own))]
    assert {"sft/evaluate", "iter2/train", "iter2/evaluate"} <= set(names)


def test_the_overlays_change_what_the_paper_changes():
    values = [load_yaml(CONFIGS / f"{name}.yaml") for name in PAPER]
    assert [item["learning_rate"] for item in values] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [item["beta"] for item in values] == [0.1, 0.1, 0.1, 5.0]
    assert [sorted(item["dataset_mixer"]) for item in values[1:]] == [
        [f"pairs/iter{step - 1}", f"pairs/iter{step}"] for step in (1, 2, 3)
    ]
    assert [item["model_name_or_path"] for item in values[1:]] == ["outputs/iter0", "outputs/iter1", "outputs/iter2"]


@pytest.mark.parametrize("name", LAUNCH)
def test_accelerate_reads_every_launch_configuration(name):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert loaded.num_processes in (2, 8)


def test_no_shipped_configuration_is_left_untested():
    known = {*LAUNCH, *PAPER, *RUNS, "own_model"}
    # Those of the relatives: test_run_online.py, test_chat_demo.py, test_sppo.py and test_weigh_stage.py; the two bases by what
    # extends them.
    online = {"demo_online", "demo_sppo", "demo_wspin", "gsm8k_small_online", "gsm8k_small_sppo", "online_gsm8k"}
    online |= {"online_gsm8k_7b", "online_sppo_math", "demo_chat", "demo_sorting", "gsm8k_small"}
    offline = {"sppo_mistral_7b", "sppo_llama3_8b", "sppo_gemma2_9b", "spin_qwen1.5_1.8b", "wspin_qwen1.5_1.8b"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == known | online | offline


def test_every_key_of_ours_is_documented():
    from transformers import TrainingArguments

    from spin.alignment.training.trainer import SPINConfig

    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for item in (ModelConfig, DataConfig, SPINConfig) for field in dataclasses.fields(item)} - theirs
    assert [name for name in sorted(ours) if f"`{name}`" not in text] == []


def test_overrides_reach_into_sections_and_win(tmp_path):
    (tmp_path / "base.yaml").write_text("a: {b: 1, c: 2}\nd: 1e-5\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\na: {b: 3}\n")
    assert load_config(tmp_path / "top.yaml", ["--a.c=[4, 5]", "--e=true"]) == {
        "a": {"b": 3, "c": [4, 5]},
        "d": "1e-5",
        "e": True,
    }


def test_a_dataset_mixer_is_replaced_not_merged(tmp_path):
    (tmp_path / "base.yaml").write_text("dataset_mixer: {old: 1.0}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ndataset_mixer: {new: 0.5}\n")
    assert load_yaml(tmp_path / "top.yaml") == {"dataset_mixer": {"new": 0.5}}


@dataclasses.dataclass
class Example:
    rate: float
    steps: int = 1
    name: str | None = None
    tags: list[str] | str = "all"
    more: dict[str, Any] | None = None


def test_values_become_the_annotated_types():
    assert build(Example, {"rate": "1e-5", "steps": 3.0, "name": 7}, "x") == Example(1e-5, 3, "7")
    assert build(Example, {"rate": 1, "tags": ["a"]}, "x").tags == ["a"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rat": 1}, "unknown key 'rat' in x; did you mean 'rate'"),
        ({"steps": 1}, "x lacks the key 'rate'"),
        ({"rate": "fast"}, "'rate' in x is 'fast', which is not a number"),
        ({"rate": True}, "which is not a number"),
        ({"rate": 1, "steps": 1.5}, "which is not a whole number"),
        ({"rate": 1, "name": [1]}, "which is not text or empty"),
        ({"rate": 1, "tags": {"a": 1}}, "which is not a list or text"),
        ({"rate": 1, "more": "a"}, "which is not a mapping or empty"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        build(Example, values, "x")


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2\n", "does not contain 'key: value' lines"),
        ("extends: self.yaml", "extends itself"),
    ],
)
def test_broken_files(tmp_path: Path, content, message):
    (tmp_path / "self.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        load_yaml(tmp_path / "self.yaml")


@pytest.mark.parametrize("argument", ["beta=1", "--beta", "--=3"])
def test_arguments_of_another_form(argument):
    with pytest.raises(InputError, match="write settings as --key=value"):
        parse_overrides([argument])


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "c.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="not valid YAML"):
        load_yaml(tmp_path / "c.yaml")


def test_old_names_are_understood():
    assert rename_keys({"warmup_ratio": 0.1, "evaluation_strategy": "no"}, "x") == {
        "warmup_steps": 0.1,
        "eval_strategy": "no",
    }


def test_a_bare_no_of_yaml_is_the_strategy_no():
    assert rename_keys(parse_overrides(["--save_strategy=no", "--bf16=false"]), "x") == {
        "save_strategy": "no",
        "bf16": False,
    }


def test_a_path_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text('extends: "\\ud800.yaml"')
    with pytest.raises(InputError, match="which is not text in UTF-8: correct the path"):
        load_yaml(tmp_path / "c.yaml")


def test_a_key_of_python_that_is_no_text_is_named():
    with pytest.raises(InputError, match="unknown key 3 in the call"):
        build(ModelConfig, {3: 4}, "the call")
