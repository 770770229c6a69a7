"""``spin init NAME``: writes a shipped configuration, and the shipped files that it names, into the user's folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from spin.alignment.core.assets import asset
from spin.alignment.core.config import load_yaml
from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.core.files import atomic_file

# Where a file goes, relative to the folder -> the file that is copied there.
Files = dict[Path, Path]

# Short names of the demos; every other configuration goes by the name of its file.
DEMOS = {"chat": "demo_chat", "online": "demo_online", "sppo": "demo_sppo", "wspin": "demo_wspin"}
SHIPPED_DATA, MADE_DATA = ("data/instructions", "data/iter0"), "data/sorting"
# A model that a script fetches: what the names of its folder start with, and the script.
FETCHED_MODEL, FETCH_SCRIPT = "models/SmolLM2-135M-Instruct", "scripts/fetch_smollm2.sh"
SCRIPTS = "scripts"
# Scripts that run the single programs. The others set up and test a checkout.
SCRIPT_FILES = (
    "checks.sh",
    "fetch_smollm2.sh",
    "finetune.sh",
    "generate.sh",
    "generate_vllm.sh",
    "run_iterations.sh",
    "slurm/*.sbatch",
)
SCRIPT_CONFIGS = ("config*.yaml", "deepspeed_zero3.yaml")


def config_names() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(path.stem for path in asset("configs").glob("*.yaml"))


def describe() -> str:
    """Return one line for each name that ``spin init`` knows, the demos first: the name, and the first sentence of its file."""
    demos = {"demo": "demo", **DEMOS}
    names = demos | {name: name for name in config_names() if name not in demos.values()}
    lines = [(name, _first_sentence(asset(f"configs/{file}.yaml"))) for name, file in names.items()]
    lines.append((SCRIPTS, "Shell and Slurm scripts around the single programs, with the configurations they read"))
    return "\n".join(f"  {name:<20}{text}" for name, text in lines)


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a configuration, without a command that it may end with."""
    head = path.read_text(encoding="utf-8").partition("\n#  ")[0].splitlines()
    comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), head))
    return re.split(r"\.(?:\s|$)|:(?:\s\s|$)", comment)[0]


def init(name: str, folder: Path) -> None:
    """Write the files of ``name`` into ``folder`` and say what to run next.

    A file that already exists with the same content is kept; the others are written only if no file is in the way.

    Raises:
        InputError: unknown name, or a file with other content is in the way; nothing has been written.
    """
    name = DEMOS.get(name, name)
    if name not in [*config_names(), SCRIPTS]:
        names = sorted({*config_names(), *DEMOS, SCRIPTS})
        raise InputError(f"there is no demo or configuration '{name}'{suggestion(name, names)} (see spin init --help)")
    with tempfile.TemporaryDirectory() as scratch:
        files = script_files() if name == SCRIPTS else config_files(f"{name}.yaml", Path(scratch))
        new = _new_files(files, folder)
        # The configuration is written last: if it exists, so do all the files that it names.
        for path in reversed(new):
            with files[path].open("rb") as source, atomic_file(folder / path) as target:
                shutil.copyfileobj(source, target)
    for place in _shown(new, folder):
        say(f"wrote {place}")
    say(_next_step(name, folder))


def script_files() -> Files:
    """Return the shell scripts and the configurations they read, in the repository's layout."""
    wanted = [("scripts", pattern) for pattern in SCRIPT_FILES] + [("configs", pattern) for pattern in SCRIPT_CONFIGS]
    found = [(top, path) for top, pattern in wanted for path in sorted(asset(top).glob(pattern))]
    return {Path(top) / path.relative_to(asset(top)): path for top, path in found}


def config_files(file_name: str, scratch: Path) -> Files:
    """Return a configuration, those that it extends, and the shipped configurations and data that it names.

    Args:
        scratch: an empty folder for data that is generated here instead of shipped.
    """
    files = _with_extended(Path(file_name))
    names = set(_texts(load_yaml(asset(f"configs/{file_name}"))))
    for text in sorted(names):
        if text.startswith("configs/"):
            files |= _with_extended(Path(text))
    for data in SHIPPED_DATA:
        if any(text.startswith(data) for text in names):
            files |= _files_under(asset(data), Path(data))
    if FETCHED_MODEL in names:
        files[Path(FETCH_SCRIPT)] = asset(FETCH_SCRIPT)
    if any(text.startswith(MADE_DATA) for text in names):
        from spin.alignment.pipeline.demos.sorting import write_data

        write_data(scratch / "sorting")
        files |= _files_under(scratch / "sorting", Path(MADE_DATA))
    return files


def _with_extended(place: Path) -> Files:
    """A configuration and, in the same folder, every one that it extends."""
    files: Files = {}
    name: str | None = place.name
    while name is not None:
        source = asset(f"configs/{name}")
        files[place.parent / name] = source
        name = yaml.safe_load(source.read_text(encoding="utf-8")).get("extends")
    return files


def _files_under(source: Path, place: Path) -> Files:
    return {place / path.relative_to(source): path for path in sorted(source.rglob("*")) if path.is_file()}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _new_files(files: Files, folder: Path) -> list[Path]:
    """Return the paths where nothing exists yet.

    Raises:
        InputError: something else exists at one of the paths.
    """
    new = []
    for place, source in files.items():
        target = folder / place
        if not target.exists():
            new.append(place)
        elif not (target.is_file() and target.read_bytes() == source.read_bytes()):
            raise InputError(
                f"{target} exists with different content and is not overwritten: move it away, or use another folder"
            )
    return new


def _shown(places: list[Path], folder: Path) -> list[str]:
    """Return the new files to list for the user; those under data/ as their folder."""
    shown = [
        f"{folder / Path(*place.parts[:2])}/" if place.parts[0] == "data" else str(folder / place) for place in places
    ]
    return list(dict.fromkeys(shown))


def _next_step(name: str, folder: Path) -> str:
    if name == SCRIPTS:
        return f"next: bash {folder / 'scripts' / 'run_iterations.sh'} --help"
    path = folder / f"{name}.yaml"
    values = load_yaml(path)
    if "run_dir" not in values:
        return f"next: read the first lines of {path}, which say what it is for"
    texts = set(_texts(values))
    if FETCHED_MODEL in texts:
        return f"next: bash {folder / FETCH_SCRIPT} && spin run {path}"
    if any(text.startswith((*SHIPPED_DATA, MADE_DATA)) for text in texts):
        return f"next: spin run {path}"
    return f"next: read the first lines of {path}, put your model and data into it, then run: spin run {path}"
