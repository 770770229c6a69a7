"""Random settings: parsing and checking them ends in success or in one sentence, never in another exception.

``SPIN_FUZZ_EXAMPLES`` sets the number of examples of the slow tests (default 20) and, times three, of the fast ones.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spin.alignment.core.config import load_config, parse_overrides
from spin.alignment.core.errors import InputError
from spin.alignment.core.flags import from_arguments
from spin.alignment.core.settings import settings_of
from spin.alignment.core.yaml_text import parse_yaml
from spin.alignment.data.config import DataConfig
from spin.alignment.data.reformat import ReformatConfig
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline import program_settings
from spin.alignment.pipeline.config import LaunchConfig, RunConfig, RunData, make_run_config
from spin.alignment.pipeline.launch_config import check_launch_config
from spin.alignment.token_weights.config import WeightsConfig
from tests.helpers.training import write_config, write_pairs

EXAMPLES = int(os.environ.get("SPIN_FUZZ_EXAMPLES", "20"))
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
SLOW = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
FAST = settings(SLOW, max_examples=3 * EXAMPLES)

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "no", "auto", "steps", "epoch", "best", "all", "none", "1e-5", "nan", "~", "~/x", "..", "a/b"]
    ),
    st.sampled_from(
        ["\0", "x" * 300, "full_shard", "cosine", "adamw_torch", "a=1", "=", "mu=1,b", "{}", "[", "module:function"]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.integers(), st.integers(10**15, 10**320), st.floats(), TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Libraries set environment variables for what they are asked to do."""
    with patch.dict(os.environ):
        yield


def known_keys(*classes: type) -> list[str]:
    return sorted({item.name for config_class in classes for item in dataclasses.fields(config_class) if item.init})


def ends_well(action: Any, *arguments: Any) -> None:
    """Run a check; an error must be one line that is not empty."""
    try:
        action(*arguments)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_config(folder / "c.yaml", tiny_model, write_pairs(folder / "pairs"))
    return path, yaml.safe_load(path.read_text())


@FAST
@given(text=st.text(alphabet="ab01:-&*!?{}[],#'\"|>%@ \n\t~.=<e\0\x85é😀", max_size=40))
def test_yaml_text(text: str) -> None:
    try:
        parse_yaml(text)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    ends_well(parse_overrides, [f"--key={text}", f"--{text}=1", text])


@FAST
@given(value=VALUES)
def test_a_value_is_read_as_it_was_written(value: Any) -> None:
    """What PyYAML writes is read back equal, but for dates, other bases and empty keys, which are text here."""
    text = yaml.safe_dump({"key": value}, allow_unicode=True)
    try:
        found = parse_yaml(text)
    except ValueError:
        return
    assert yaml.safe_dump(found, allow_unicode=True) == text or isinstance(value, dict | list | str)


@pytest.mark.parametrize(
    "config_class", [ReformatConfig, GenerateConfig, ConvertConfig, SelectConfig, WeightsConfig, EvaluateConfig]
)
@FAST
@given(data=st.data())
def test_flags(config_class: type, data: st.DataObject) -> None:
    names = [*settings_of(config_class), "nonsense"]
    words = []
    for name in data.draw(st.lists(st.sampled_from(names), max_size=6)):
        numbers = st.one_of(st.integers(), st.floats()).map(str)
        words += [f"--{name}", *data.draw(st.lists(st.one_of(TEXTS, numbers), max_size=2))]
    ends_well(from_arguments, config_class, words, "program")


@pytest.mark.parametrize("program", ["run_spin", "run_sft", "run_online"])
@SLOW
@given(data=st.data())
def test_training_configurations(program: str, data: st.DataObject, base: tuple[Path, dict[str, Any]]) -> None:
    from spin.alignment.training.check_settings import check_model_settings, checked_settings
    from spin.alignment.training.online.run import OnlineTraining
    from spin.alignment.training.preference import PreferenceTraining
    from spin.alignment.training.sft import SFTTraining

    kind = {"run_spin": PreferenceTraining, "run_sft": SFTTraining, "run_online": OnlineTraining}[program]()
    keys = st.sampled_from(known_keys(ModelConfig, DataConfig, kind.arguments_class))
    changes = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    path, values = base
    own = {"scorer": "math_answer", "max_new_tokens": 8} if program == "run_online" else {}
    splits = {} if program == "run_spin" else {"dataset_splits": ["train"]}
    path.write_text(yaml.safe_dump(values | own | splits | changes))

    def check() -> None:
        found = checked_settings(kind, load_config(path), "c.yaml")
        check_model_settings(found.model, "c.yaml")

    ends_well(check)


@FAST
@given(data=st.data())
def test_run_configurations(data: st.DataObject, base: tuple[Path, dict[str, Any]]) -> None:
    path, values = base
    run = {
        "run_dir": str(path.parent / "run"),
        "model": values["model_name_or_path"],
        "data": {"train": str(path.parent)},
    }
    sections = {"generate": GenerateConfig, "convert": ConvertConfig, "select": SelectConfig}
    sections |= {"evaluate": EvaluateConfig, "data": RunData}
    for key in data.draw(st.lists(st.sampled_from(known_keys(RunConfig)), max_size=3)):
        if key in sections and data.draw(st.booleans()):
            inside = st.dictionaries(st.sampled_from(known_keys(sections[key])), VALUES, max_size=2)
            run[key] = data.draw(inside)
        else:
            run[key] = data.draw(VALUES)

    def check() -> None:
        config = make_run_config(run, "run.yaml")
        if config.self_play_iterations:
            program_settings.generate_config(config, 0)
            program_settings.convert_config(config, 0)
        if config.select is not None:
            program_settings.sample_config(config)
            program_settings.select_config(config)
        program_settings.evaluate_config(config, "start", config.start_model)

    ends_well(check)


@FAST
@given(data=st.data())
def test_launch_configurations(data: st.DataObject, base: tuple[Path, dict[str, Any]]) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    keys = st.sampled_from(known_keys(ClusterConfig))
    kinds = st.sampled_from(["NO", "MULTI_GPU", "DEEPSPEED", "FSDP", 3, None])
    values = {"distributed_type": data.draw(kinds), **data.draw(st.dictionaries(keys, VALUES, max_size=3))}
    path = base[0].parent / "launch.yaml"
    path.write_text(yaml.safe_dump(values))
    ends_well(check_launch_config, LaunchConfig(config_file=str(path)))
