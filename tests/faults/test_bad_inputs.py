"""Bad inputs of every program: exit code 2, one sentence with the fix, within seconds, nothing written, no model loaded."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from tests.helpers import REPOSITORY, program_environment, run_main, save_tiny_model
from tests.helpers.runs import tiny_run, write_sums
from tests.helpers.training import write_config, write_pairs

TABLE: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "bad_inputs.yaml").read_text("utf-8"))
SECONDS = 8.0
TRAINED = ("run_spin", "run_sft", "run_online")
LAUNCH = {
    "zero": {"distributed_type": "MULTI_GPU", "num_processes": 0},
    "both": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 2},
        "fsdp_config": {"fsdp_version": 2},
    },
    "text": {"distributed_type": "MULTI_GPU", "num_processes": "two"},
    "stage": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 9}},
    "kind": {"distributed_type": "nonsense", "num_processes": 1},
    "json": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "none.json"}},
}


@dataclass
class Place:
    """A folder with a working input for every program."""

    root: Path
    words: dict[str, str] = field(default_factory=dict)

    def fill(self, text: str) -> str:
        for name, value in self.words.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """Return size and time of change of everything in the folder."""
        found = ((path, path.lstat()) for path in sorted(self.root.rglob("*")))
        return {str(path.relative_to(self.root)): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    for name in ("preference", "sft", "online.run", "check_settings"):  # their imports are not part of any case's time
        importlib.import_module(f"spin.alignment.training.{name}")
    root = tmp_path_factory.mktemp("bad_inputs")
    model, pairs = save_tiny_model(root / "model"), write_pairs(root / "pairs")
    write_pairs(pairs, 6, "test")
    prompts = write_sums(root / "prompts")
    from spin import reformat

    for split in ("train", "test"):
        words = ("--data", prompts / f"{split}.jsonl", "--output_dir", root / "made", "--split", split)
        assert run_main(reformat.main, *words)[0] == 0
    (root / "fractions").mkdir()
    (root / "dangling").symlink_to(root / "nowhere")
    for name, values in LAUNCH.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    words = {"tmp": root, "model": model, "pairs": pairs, "prompts": root / "made", "fractions": root / "fractions"}
    more = {"config": root / "config.yaml", "deep": "[" * 3000 + "]" * 3000, "digits": "9" * 5000, "long": "x" * 300}
    return Place(root, {name: str(value) for name, value in {**words, **more}.items()})


def working_config(program: str, place: Place) -> dict[str, Any]:
    """Return a configuration of a program that works."""
    if program.startswith("spin"):
        data = {"train": str(place.root / "made"), "test": str(place.root / "made")}
        return tiny_run(place.root, iterations=1, overrides=None, data=data, run_dir=str(place.root / "run"))
    path = write_config(place.root / "base.yaml", Path(place.words["model"]), Path(place.words["pairs"]))
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    path.unlink()
    if program != "run_spin":
        values |= {"dataset_mixer": {str(place.root / "made"): 1.0}, "dataset_splits": ["train"]}
    if program == "run_online":
        values |= {"scorer": "math_answer", "max_new_tokens": 8, "max_steps": 2}
    return values


def flags(program: str, place: Place) -> str:
    """Return a command line of a program that works."""
    return place.fill(
        {
            "reformat": "--data {tmp}/prompts/train.jsonl --output_dir {tmp}/out",
            "generate": "--model {model} --input_dir {prompts} --output_dir {tmp}/out --max_new_tokens 4",
            "convert_data": "--input_dir {fractions} --output_dir {tmp}/out",
            "estimate_weights": "--input_dir {pairs} --output_dir {tmp}/out --weighting uniform --tokenizer {model}",
            "evaluate_model": "--model {model} --input_dir {prompts} --output_file {tmp}/out.json",
        }[program]
    )


def write_changed(values: dict[str, Any], change: str, place: Place) -> None:
    """Write the configuration with the lines of ``change`` in place of the keys of the same name."""
    target, whole = Path(place.words["config"]), change.removeprefix("file:")
    if change.startswith("file:"):
        special = {"bytes": bytes(range(256)), "utf16": "beta: 1".encode("utf-16")}
        target.write_bytes(special.get(whole, whole.encode()))
        return
    if change.startswith("{"):  # several keys: one per line
        change = "\n".join(line for line in yaml.safe_dump(yaml.safe_load(change)).splitlines())
    keys = re.findall(r"^([\w]+):", change, flags=re.MULTILINE)
    kept = yaml.safe_dump({key: value for key, value in values.items() if key not in keys}, sort_keys=False)
    target.write_text(kept + change + "\n")


def check(place: Place, run: Callable[[], tuple[int, str, str]], says: str) -> None:
    """Run a program with a bad input and check everything that must be true of its end."""
    before, started = place.snapshot(), time.monotonic()
    code, _, err = run()
    seconds, lines = time.monotonic() - started, err.strip().splitlines()
    assert code == 2, f"exit code {code}: {err[-2000:]}"
    assert len(lines) == 1 and lines[0].startswith("error: "), err[-2000:]
    assert says in lines[0], lines[0]
    assert re.search(r"(: |; did you mean|^set |see -?-h)", lines[0].removeprefix("error: ")), f"no fix: {lines[0]}"
    assert len(lines[0]) < 1500, "a long sentence"
    assert seconds < SECONDS, f"{seconds:.1f} seconds"
    assert place.snapshot() == before, "something was written"


@pytest.fixture(autouse=True)
def no_model() -> Iterator[None]:
    """Loading a model's weights fails the test."""
    import transformers

    original = transformers.PreTrainedModel.from_pretrained.__func__

    def load(model_class: type, *arguments: Any, **settings: Any) -> Any:
        # The headers of the weights may be compared with the configuration, without memory or computation.
        if settings.get("device_map") == {"": "meta"}:
            return original(model_class, *arguments, **settings)
        raise AssertionError("a model was loaded")

    with patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(load)):
        yield


def cases(*programs: str) -> list[Any]:
    return [
        pytest.param(program, change, says, id=f"{program} {change[:60]}")
        for program in programs
        for change, says in TABLE[program].items()
    ]


@pytest.mark.parametrize(("program", "change", "says"), cases(*TRAINED, "spin run", "spin config"))
def test_a_bad_configuration(
    program: str, change: str, says: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    change = place.fill(change)
    values = working_config(program, place)
    words = [place.words["config"]]
    write_changed(values, "" if change.startswith("args:") else change, place)
    if change.startswith("args:"):
        words = shlex.split(change.removeprefix("args:"))
    if program.startswith("spin"):
        main, words = importlib.import_module("spin.cli").main, [program.split()[1], *words]
    else:
        main = importlib.import_module(f"spin.{program}").main
    check(place, lambda: run_main(main, *words), says)


@pytest.mark.parametrize(
    ("program", "change", "says"), cases("reformat", "generate", "convert_data", "estimate_weights", "evaluate_model")
)
def test_bad_flags(program: str, change: str, says: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    change = place.fill(change)
    words = change.removeprefix("args:") if change.startswith("args:") else f"{flags(program, place)} {change}"
    main = importlib.import_module(f"spin.{program}").main
    check(place, lambda: run_main(main, *shlex.split(words)), says)


@pytest.mark.parametrize(("program", "change", "says"), cases("spin"))
def test_bad_commands(program: str, change: str, says: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    main = importlib.import_module("spin.cli").main
    check(place, lambda: run_main(main, *shlex.split(place.fill(change))), says)


@pytest.mark.parametrize(("program", "change", "says"), cases("scripts"))
def test_bad_arguments_of_scripts(program: str, change: str, says: str, place: Place) -> None:
    words = shlex.split(change)
    count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    given = {name: value for name, _, value in (word.partition("=") for word in words[:count])}

    def run() -> tuple[int, str, str]:
        inherited = {key: value for key, value in program_environment().items() if key not in ("MODEL", "GPUS")}
        command = ["bash", str(REPOSITORY / "scripts" / words[count]), *words[count + 1 :]]
        environment = {"PYTHON": sys.executable, **inherited, **given}
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout, done.stderr

    check(place, run, says)


def test_the_bases_of_the_table_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change, every configuration passes all of its checks: the entries fail for their own reason."""
    from spin.alignment.pipeline.config import make_run_config
    from spin.alignment.pipeline.preflight import check_before_start
    from spin.alignment.training.check_settings import check_model_settings, checked_settings
    from spin.alignment.training.online.run import OnlineTraining
    from spin.alignment.training.preference import PreferenceTraining
    from spin.alignment.training.sft import SFTTraining

    monkeypatch.chdir(place.root)
    for name, program in zip(TRAINED, (PreferenceTraining(), SFTTraining(), OnlineTraining()), strict=True):
        settings = checked_settings(program, working_config(name, place), name)
        check_model_settings(settings.model, name)
    check_before_start(make_run_config(working_config("spin run", place), "run"), "run")


def test_a_program_of_its_own_ends_alike(place: Place) -> None:
    """One bad input in a process of its own: the same sentence alone on stderr, at once."""
    write_changed(working_config("run_spin", place), "beta: .inf", place)
    command = [sys.executable, str(REPOSITORY / "spin" / "run_spin.py"), place.words["config"]]
    environment = program_environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "beta is inf" in done.stderr, done.stderr


def test_an_unreadable_configuration_is_named(place: Place) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    locked = place.root / "locked.yaml"
    locked.write_text("beta: 1")
    locked.chmod(0)
    from spin import run_spin

    code, _, err = run_main(run_spin.main, locked)
    locked.unlink()
    assert code == 2 and "locked.yaml" in err


def test_the_table_is_large() -> None:
    counts = {program: len(entries) for program, entries in TABLE.items()}
    sys.stdout.write(f"bad inputs: {sum(counts.values())} {json.dumps(counts)}\n")
    assert sum(counts.values()) >= 200
