"""The public names of ``spin``: lazy, documented, robust, and the example of docs/python_api.md."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import yaml

import spin
from tests.helpers import REPOSITORY, run_command, save_tiny_model
from tests.helpers.runs import tiny_run, write_sums

PAGE = (REPOSITORY / "docs" / "python_api.md").read_text(encoding="utf-8")
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "peft", "numpy", "pyarrow")


def python(code: str) -> str:
    """Run code in a fresh interpreter; return what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


def names_for_type_checkers() -> dict[str, str]:
    """Public name -> module, from the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse((REPOSITORY / "spin" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_importing_spin_imports_no_library():
    found = python(f"import spin, sys; dir(spin); spin.InputError; print(*(set({HEAVY!r}) & set(sys.modules)))")
    assert found.strip() == ""


def test_the_three_lists_of_names_agree():
    assert sorted(spin.__all__) == sorted(spin._DEFINED_IN)
    assert names_for_type_checkers() == spin._DEFINED_IN
    assert (REPOSITORY / "spin" / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("name", spin.__all__)
def test_each_public_name_is_importable_and_on_the_page(name):
    value = getattr(spin, name)
    assert value is getattr(importlib.import_module(spin._DEFINED_IN[name]), name)
    assert name in dir(spin)
    (line,) = re.findall(rf"^\| `spin\.{name}[`(].*$", PAGE, re.MULTILINE)
    assert len(line.split("|")[2].strip()) > 20


def test_the_page_has_no_other_name():
    assert set(re.findall(r"\bspin\.(\w+)(?!\w*\.)", PAGE)) - {"alignment"} <= set(spin.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'spin' has no attribute 'SPINTrainr'"):
        spin.SPINTrainr  # noqa: B018


def test_a_program_does_not_take_the_place_of_the_function_of_its_name():
    code = (
        "import importlib, pkgutil, sys, spin, spin.generate; from spin.generate import main\n"
        "programs = [module.name for module in pkgutil.iter_modules(spin.__path__) if module.name != '__main__']\n"
        "for name in programs: importlib.import_module(f'spin.{name}')\n"
        "print(spin.generate is spin.python_api.generate, sys.modules['spin.generate'].main is main, 'generate' in programs)"
    )
    assert python(code).split() == ["True", "True", "True"]


def test_the_functions_raise_where_the_programs_exit(tmp_path):
    with pytest.raises(spin.InputError, match=r"temprature.*did you mean '.*temperature'"):
        spin.generate(model="m", input_dir="d", output_dir=tmp_path / "out", temprature=0.0)
    with pytest.raises(spin.InputError, match=r"model folder \./nowhere does not exist"):
        spin.generate(model="./nowhere", input_dir="d", output_dir=tmp_path / "out")
    with pytest.raises(spin.InputError, match=r"temperatures is \[0.0, 0.0\]: give one or more, each once"):
        spin.evaluate(model="m", input_dir="d", output_file=tmp_path / "e.json", temperatures=[0.0, 0.0])
    with pytest.raises(spin.InputError, match="unknown pairing 'best'"):
        spin.convert(input_dir="d", output_dir=tmp_path / "out", pairing="best")
    with pytest.raises(
        spin.InputError, match="unknown key 'itertions' in the configuration; did you mean 'iterations'"
    ):
        spin.run({"run_dir": str(tmp_path / "run"), "model": "m", "data": {"train": "d"}}, itertions=2)
    with pytest.raises(spin.InputError, match=r"configuration file .*c.yaml does not exist"):
        spin.run(tmp_path / "c.yaml")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "out"
    for call in (
        lambda: spin.generate(model="m", input_dir="d", output_dir=below),
        lambda: spin.convert(input_dir="d", output_dir=below),
        lambda: spin.evaluate(model="m", input_dir="d", output_file=below / "e.json"),
    ):
        with pytest.raises(spin.InputError, match=r"output_\w+ .* is below .*file, which is a file"):
            call()


def test_run_checks_as_the_command_and_raises_by_exit_code(tmp_path, monkeypatch):
    values, seen = tiny_run(tmp_path), []
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for code, error in ((0, None), (2, spin.InputError), (1, RuntimeError), (130, KeyboardInterrupt)):
        monkeypatch.setattr(
            "spin.alignment.pipeline.runner.run_stages", lambda *given, code=code, **_: (seen.append(given), code)[1]
        )
        for config in (values, tmp_path / "run.yaml"):
            with nullcontext() if error is None else pytest.raises(error):
                found = spin.run(
                    config, rerun_changed=True, seed=7, train={"beta": 0.5}, overrides={"1": {"beta": 2.0}}
                )
                assert found == tmp_path / "run"
    assert len(seen) == 8
    for config, rerun_changed in seen:
        assert (config.seed, config.iterations, rerun_changed) == (7, 2, True)
        assert config.train == values["train"] | {"beta": 0.5} and config.overrides[1] == {"beta": 2.0}
    with pytest.raises(spin.InputError, match="unknown key 'betta' in the section 'train' of the configuration"):
        spin.run(values, train={"betta": 0.5})


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    save_tiny_model(tmp_path / "my-sft-model")
    write_sums(tmp_path / "data", 8, 4)
    (tmp_path / "example.py").write_text(code + "\nprint(trainer.state.global_step, scores['n'])\n")
    search_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = run_command(["env", "-C", tmp_path, sys.executable, "example.py"], PYTHONPATH=search_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "1 4"
    assert (tmp_path / "outputs" / "iter0" / "model.safetensors").exists()
