"""What readers of the documentation type is understood: every command, flag, key, file and extra that a page names."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest

from scripts.make_docs import CLASSES, command_help
from spin.alignment.core.config import merge, parse_overrides
from spin.alignment.core.errors import InputError
from spin.alignment.core.flags import from_arguments, parser_of
from spin.alignment.core.settings import checked_value, hints_of, settings_of
from spin.alignment.core.yaml_text import parse_yaml
from spin.alignment.data.reformat import ReformatConfig
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline.config import RunConfig
from spin.alignment.pipeline.init import DEMOS, config_names
from spin.alignment.pipeline.planning.options import split_arguments
from spin.alignment.pipeline.resolve import resolve
from spin.alignment.token_weights.config import WeightsConfig
from spin.cli import COMMANDS
from tests.helpers import REPOSITORY
from tests.helpers.doc_code import Command, blocks, commands_of, inline_codes

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
PAGES += tuple(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))
FLAGS = {
    "reformat": ReformatConfig,
    "generate": GenerateConfig,
    "convert_data": ConvertConfig,
    "select_responses": SelectConfig,
    "estimate_weights": WeightsConfig,
    "evaluate_model": EvaluateConfig,
}
# Programs, and configurations, which say in a docstring, or in the comment at their head, how they are started.
FILES = tuple(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("spin/*.py", "benchmarks/*.py", "scripts/*.py", "recipes/*.py", "configs/*.yaml")
    for path in sorted(REPOSITORY.glob(pattern))
)
# A path below a folder of the repository, or of spin/alignment; upper-case parts are placeholders.
FOLDERS = (
    "spin|scripts|configs|docs|tests|benchmarks|recipes|notebooks|core|data|methods|models|rewards|logprobs|generation"
)
FOLDERS += "|pairs|token_weights|training|evaluation|pipeline|report"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[a-z0-9_./*-]+\.(?:py|sh|ya?ml|sbatch|json|md|ipynb)(?![\w*])")
TRAININGS = ("run_spin", "run_sft", "run_online")
# A configuration that a page speaks of without showing it stands for one with these settings.
UNSEEN = {
    "run": ["configs/own_model.yaml", "--model=M", "--data.train=D", "--data.test=D"],
    "run_spin": ["configs/config.yaml"],
    "run_sft": ["benchmarks/results/evidence/b/sft.yaml"],
    "run_online": ["configs/online_gsm8k.yaml"],
}


def completed(config_class: type, arguments: list[str]) -> list[str]:
    """Return arguments with the required flags that are left out, and with values for flags that are only named."""
    actions = [action for action in parser_of(config_class, "")._actions if action.option_strings]
    named = {word.partition("=")[0] for word in arguments}
    result = [
        action.option_strings[0] for action in actions if action.required and not named & set(action.option_strings)
    ]
    flags = {action.option_strings[0] for action in actions if action.nargs != 0}
    words, result = [*result, *arguments, "--"], []
    for word, following in pairwise(words):
        result.append(word)
        if word in flags and following.startswith("--"):
            result.append("1")
    return result


def check_flags(config_class: type, arguments: list[str], complete: bool) -> None:
    """Raise InputError for a flag or a value that the program refuses."""
    given = [word for word in arguments if word != "..."]
    if not complete or len(given) < len(arguments):
        given = completed(config_class, given)
    # Whether a folder such as /shared could be written here says nothing about the page.
    with mock.patch("spin.alignment.core.flags.check_outputs"):
        from_arguments(config_class, given, "")


def check_keys(program: str | None, arguments: list[str]) -> None:
    """Raise InputError for a key or a value that the program of a configuration file (None: inferred from it) refuses."""
    path, *overrides = [word for word in arguments if word != "..."] or ["CONFIG.yaml"]
    shipped = [path, f"configs/{Path(path).name}"]
    known = next((name for name in shipped if (REPOSITORY / name).is_file()), None)
    if path.startswith("configs/") and known != path:
        raise InputError(f"{path} is not part of the project")
    file, *needed = [known] if known else UNSEEN[program or "run"]
    if known and Path(known).stem == "own_model":
        needed = [item for item in UNSEEN["run"][1:] if item.partition("=")[0] not in " ".join(overrides)]
    resolve(REPOSITORY / file, [*needed, *overrides], program, every=False)


def check_spin(arguments: list[str], complete: bool) -> None:
    """Raise InputError for an unknown command of ``spin``, or what that command refuses."""
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("--help", "--version") or name.isupper():
        return
    if name not in COMMANDS:
        raise InputError(f"there is no command spin {name}")
    if name == "eval":
        check_flags(EvaluateConfig, rest, complete)
    elif name == "init":
        if rest and not rest[0].isupper() and rest[0] not in (*config_names(), *DEMOS, "scripts", "--help"):
            raise InputError(f"spin init knows no {rest[0]}")
    elif name == "plan":
        check_keys("run", split_arguments(rest)[1])
    elif name in ("run", "config"):
        own = {word.partition("=")[0]: word.partition("=")[2] for word in rest}
        options = ("--rerun_changed", "--all", "--program", "--help")
        check_keys(
            "run" if name == "run" else own.get("--program"),
            [word for word in rest if word.partition("=")[0] not in options],
        )
    else:
        help_text = command_help([name])
        for flag in (word.partition("=")[0] for word in rest if word.startswith("-")):
            if not re.search(rf"(?<![\w-]){flag}\b", help_text):
                raise InputError(f"spin {name} has no {flag}")


def check_program(name: str, arguments: list[str], complete: bool) -> None:
    """Raise InputError for what a program of ``spin/`` refuses."""
    if "--help" in arguments or name.isupper():
        return
    if name in TRAININGS:
        check_keys(name, arguments)
    elif name in FLAGS:
        check_flags(FLAGS[name], arguments, complete)
    else:
        raise InputError(f"there is no program spin/{name}.py")


def check_other_program(path: str, arguments: list[str]) -> None:
    """Raise InputError for a file of the repository that does not exist, or a flag that it does not have."""
    file = REPOSITORY / path
    if not file.is_file():
        raise InputError(f"{path} is not part of the project")
    if path.startswith("benchmarks/"):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        if hasattr(module, "make_parser"):
            module.make_parser().parse_args([word for word in arguments if word != "..."])
            return
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        if f'"{flag}"' not in file.read_text(encoding="utf-8"):
            raise InputError(f"{path} has no {flag}")


def check_script(path: str, arguments: list[str], variables: list[str]) -> None:
    """Raise InputError for a script that does not exist, a variable it does not read, or what the program behind it refuses."""
    file = REPOSITORY / path
    if not file.is_file():
        raise InputError(f"{path} is not part of the project")
    scripts = "\n".join(item.read_text(encoding="utf-8") for item in file.parent.rglob("*.s*") if item.is_file())
    for name in variables:
        if not re.search(rf"\b{name}\b", scripts):
            raise InputError(f"{path} reads no variable {name}")
    options = [word for word in arguments if not re.fullmatch(r"\w+|[\w./]*/[\w./]*", word) or word.startswith("--")]
    if file.stem in ("generate", "generate_vllm"):
        check_flags(GenerateConfig, arguments[1:], complete=False)
    elif file.stem == "finetune":
        check_keys("run_spin", ["CONFIG.yaml", *options])
    elif file.stem == "demo":
        demo = next((DEMOS[word] for word in arguments if word in DEMOS), "demo")
        check_keys("run", [f"configs/{demo}.yaml", *(["--model=M"] if demo == "demo_chat" else []), *options])


def check_extras(words: list[str]) -> None:
    """Raise InputError for an extra in ``pip install`` that setup.py does not have."""
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"(?:\.|selfplay-spin)\[([\w,-]+)\]", " ".join(words)):
        for name in extra.split(","):
            if f'    "{name}": ' not in setup:
                raise InputError(f"there is no extra {name}")


def refuse(message: str) -> NoReturn:
    """In place of ``ArgumentParser.error``, which ends the process."""
    raise InputError(message)


def check_launch(words: list[str]) -> list[str]:
    """Return the program that ``accelerate launch`` starts, with its arguments; InputError for a flag it does not have."""
    from accelerate.commands.launch import launch_command_parser

    starts = "-m" in words or any(word.endswith(".py") for word in words)
    parser = launch_command_parser()
    parser.error, parser.allow_abbrev = refuse, False
    given = parser.parse_args([*words, *([] if starts else ["PROGRAM.py", "..."])])
    if given.config_file and not (REPOSITORY / given.config_file).is_file():
        raise InputError(f"{given.config_file} is not part of the project")
    return [*(["-m"] if given.module else []), given.training_script, *given.training_script_args]


def check(command: Command) -> None:
    """Raise InputError if a command of a page is not understood; commands of other projects pass."""
    # N, or a variable such as $RANK, is a number.
    words = [re.sub(r"^\$\w+$|(?<==)N$", "1", word) for word in command.words]
    if words[:2] == ["taskset", "-c"]:
        words = words[3:]
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *check_launch(words[2:])]
    if words[0] in ("spin", "selfplay-spin") or words[:3] == ["python", "-m", "spin"]:
        check_spin(words[1 if words[0] != "python" else 3 :], command.complete)
    elif words[0] == "pip":
        check_extras(words)
    elif words[0] == "bash" and len(words) > 1 and words[1].startswith(("scripts/", ".ci/")):
        check_script(words[1], words[2:], command.variables)
    elif words[0] == "python" and len(words) > 1:
        module = words[2].replace(".", "/") + ".py" if words[1] == "-m" and len(words) > 2 else words[1]
        rest = words[3:] if words[1] == "-m" else words[2:]
        program = re.fullmatch(r"spin/(\w+)\.py", module)
        if program:
            check_program(program[1], rest, command.complete)
        elif module.startswith(("benchmarks/", "scripts/", "tests/", "recipes/", "spin/")):
            package = REPOSITORY / module.removesuffix(".py") / "__main__.py"
            check_other_program(str(package.relative_to(REPOSITORY)) if package.is_file() else module, rest)


def text_of(name: str) -> str:
    """Return a page as it is, and of another file what it says of itself."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    if name.endswith(".yaml"):
        lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#   ")]
        return "\n".join(["```bash", *lines, "```"])
    return text


@pytest.mark.parametrize("name", [*PAGES, *FILES])
def test_every_command_is_understood(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text, wrong = text_of(name), []
    for module, code in re.findall(r"```python\n# (\w+\.py)\b[^\n]*\n(.*?)```", text, re.DOTALL):
        (tmp_path / module).write_text(code, encoding="utf-8")  # what a reader saves under that name
    monkeypatch.syspath_prepend(tmp_path)
    for command in commands_of(text):
        try:
            check(command)
        except InputError as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


# Keys in sentences that are not settings: columns of data and keys of turns, and keys of other tools that are refused here.
NOT_SETTINGS = {
    "role",
    "finish_reason",
    "stop_reason",
    "correct",
    "deleted",
    "winner",
    "weight",
    "train",
    "extends",
    "key",
}
NOT_SETTINGS |= {"padding_free", "precompute_ref_log_probs", "lora_dropout"}


def fragments_of(name: str) -> list[dict]:
    """Return the settings on a page: its YAML blocks, and those in sentences such as ``stop: {when: worse}`` or ``a.b: c``."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if name == "docs/coming_from.md":
        text = re.sub(r"^\| .+? \| ", "", text, flags=re.MULTILINE)  # what other tools have
    found = [parse_yaml(block) for block in blocks(text, "yaml")]
    for code in inline_codes(text):
        key, separator, value = code.partition(": ")
        # A single letter stands for a number.
        if separator and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and not re.search(r"\b[a-zA-Z]\b|\.\.\.", value):
            found.append(parse_overrides([f"--{key}={value}"]))
    return found


def check_fragment(fragment: dict, classes: list[type], folder: Path) -> None:
    """Raise InputError unless some program has the key of a fragment and takes its value, or the fragment fits into a run."""
    key, value = next(iter(fragment.items()))
    if len(fragment) > 1 or (isinstance(value, dict) and key in settings_of(RunConfig)):
        base = {
            "run_dir": str(folder / "run"),
            "model": "M",
            "data": {"train": "D", "test": "D"},
            "launch": {"cluster": "ray"},
        }
        (folder / "run.yaml").write_text(json.dumps(merge(base, fragment)), encoding="utf-8")
        return resolve(folder / "run.yaml", [], "run", every=False)
    errors = [InputError(f"no program has the key {key}")]
    for config_class in classes:
        field = {field.name: field for field in dataclasses.fields(config_class)}.get(key)
        if field is not None:
            try:
                return checked_value(field, hints_of(config_class)[key], value, key)
            except InputError as error:
                errors.append(error)
    raise errors[-1]


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_is_accepted(name, tmp_path, monkeypatch):
    from spin.alignment.pipeline.resolve import arguments_class

    monkeypatch.chdir(REPOSITORY)
    classes, wrong = [*CLASSES.values(), *map(arguments_class, TRAININGS)], []
    for fragment in fragments_of(name):
        if next(iter(fragment)) in NOT_SETTINGS and not isinstance(next(iter(fragment.values())), dict):
            continue
        try:
            check_fragment(fragment, classes, tmp_path)
        except InputError as error:
            wrong.append(f"{fragment}: {error}")
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_python_and_json_can_be_read_and_what_is_imported_exists(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for block in blocks(text, "json"):
        json.loads(block)
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("spin"):
                module = importlib.import_module(node.module)
                missing = [item.name for item in node.names if not hasattr(module, item.name)]
                missing = [item for item in missing if find_spec(f"{node.module}.{item}") is None]
                assert missing == [], node.module


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_the_project_that_a_page_names_exists(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if name == "docs/coming_from.md":
        text = re.sub(r"^\| .+? \| ", "", text, flags=re.MULTILINE)  # what other tools have
    named = {path for code in inline_codes(text) for path in FILE.findall(code)}
    folders = [REPOSITORY, REPOSITORY / "spin", REPOSITORY / "spin" / "alignment"]
    assert [path for path in sorted(named) if not any(list(folder.glob(path)) for folder in folders)] == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("```bash\nspin run configs/demo.yaml --train.bta=1\n```\n", "did you mean 'beta'"),
        ("```bash\npython spin/generate.py --model M --input_dir D\n```\n", "--output_dir"),
        ("A sentence with `python spin/generate.py --modle M`.", "--modle"),
        ("Then:\n\n    accelerate launch --mixed spin/run_spin.py configs/config.yaml\n", "--mixed"),
        ("```bash\nspin status RUN --all\n```\n", "spin status has no --all"),
        ("```bash\nspin init dmo && spin run dmo.yaml\n```\n", "spin init knows no dmo"),
        ("```bash\nspin run configs/none.yaml\n```\n", "configs/none.yaml is not part"),
        ("```bash\nMODLE=m bash scripts/generate.sh 0\n```\n", "reads no variable MODLE"),
        ("```bash\nbash scripts/finetune.sh 0 --bta=1\n```\n", "unknown key 'bta'"),
        ("```bash\npip install -e '.[vlm]'\n```\n", "there is no extra vlm"),
        ("```bash\npython benchmarks/page.py --none 1\n```\n", "has no --none"),
    ],
)
def test_a_wrong_command_is_found(text, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError, match=message):
        for command in commands_of(text):
            check(command)


@pytest.mark.parametrize("fragment", [{"bta": 1}, {"beta": "much"}, {"stop": {"whn": "worse"}}, {"train": {"bta": 1}}])
def test_a_wrong_setting_is_found(fragment, tmp_path):
    with pytest.raises(InputError, match=r"bta|beta|whn"):
        check_fragment(fragment, list(CLASSES.values()), tmp_path)
