"""Writes the generated sections of README.md and docs/*.md: tables of settings and of results, and the map of modules.

    python scripts/make_docs.py          # after changing a setting or a module's docstring; a test fails if a section is stale

A generated section is enclosed by a marker and ``<!-- end -->``:

    <!-- keys: CLASS -->                 the settings of a class
    <!-- flags: CLASS -->                the same, with two dashes before each name
    <!-- keys: CLASS / group, group -->  only the settings of these groups
    <!-- instructions -->                the kinds of verifiable instructions, from the docstrings of their functions
    <!-- help: spin COMMAND -->          what `spin COMMAND --help` prints
    <!-- help: scripts/FILE -->          what a shell script prints with -h
    <!-- packages -->                    the packages of spin/alignment in the order of imports
    <!-- modules -->                     one table of modules per package, from the first paragraph of each docstring
    <!-- results: NAME -->               a table of results (TABLES in benchmarks/result_tables.py) with intervals
    <!-- speed: FILE -->                 the fine-tuning benchmark in benchmarks/results/FILE.json
    <!-- sft: FILE -->                   the SFT benchmark in benchmarks/results/FILE.json
    <!-- ratios: FILE, FILE -->          how much faster than its peers the project is in these benchmarks
    <!-- generation: FILE -->            the generation benchmark in benchmarks/results/FILE.json
    <!-- bookkeeping: FILE FILE -->      generation without the engine by stage, in the same folder
    <!-- scale: FILE -->                 generation and gathering of many rows without a model, in the same folder
    <!-- async: FILE -->                 what sampling ahead gains, in the same folder
    <!-- faults: FILE -->                the faults that `python -m tests.faults` injected, in benchmarks/results/FILE.json
    <!-- evidence: STUDY -->             the results of a study of docs/evidence.md so far, in benchmarks/results/evidence
    <!-- plan: NAME -->                  plans of shipped configurations (benchmarks/plan_tables.py): 7b, 70b, limits, 7b formulas
    <!-- value: ENTRY / MODEL / KEY -->  one number of benchmarks/results/demos.json, inside a sentence
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import demo_plot  # noqa: E402
from benchmarks.async_table import async_table  # noqa: E402
from benchmarks.evidence.tables import evidence_tables  # noqa: E402
from benchmarks.plan_tables import plan_tables  # noqa: E402
from benchmarks.result_tables import (  # noqa: E402
    bookkeeping_table,
    decoding_table,
    faults_table,
    generation_table,
    ratios_table,
    results_table,
    scale_table,
    sft_table,
    speed_table,
    start_table,
    value,
)
from spin import cli  # noqa: E402
from spin.alignment.core.errors import lookup  # noqa: E402
from spin.alignment.core.files import write_text_atomic  # noqa: E402
from spin.alignment.core.key_tables import key_table  # noqa: E402
from spin.alignment.core.settings import grouped  # noqa: E402
from spin.alignment.data.config import DataConfig  # noqa: E402
from spin.alignment.data.reformat import ReformatConfig  # noqa: E402
from spin.alignment.evaluation.config import EvaluateConfig  # noqa: E402
from spin.alignment.generation.config import GenerateConfig  # noqa: E402
from spin.alignment.models.config import ModelConfig  # noqa: E402
from spin.alignment.pairs.config import ConvertConfig, SelectConfig  # noqa: E402
from spin.alignment.pipeline.config import LaunchConfig, RunConfig, RunData, StopConfig  # noqa: E402
from spin.alignment.rewards.instructions import KINDS  # noqa: E402
from spin.alignment.rewards.instructions.rows import arguments_of  # noqa: E402
from spin.alignment.token_weights.config import WeightsConfig  # noqa: E402
from spin.alignment.training.keys import OutputConfig, SFTKeys, SPINKeys  # noqa: E402
from spin.alignment.training.online.keys import OnlineKeys  # noqa: E402

CLASSES: dict[str, type] = {
    item.__name__: item
    for item in (
        *(ReformatConfig, GenerateConfig, ConvertConfig, SelectConfig, WeightsConfig, EvaluateConfig),
        *(ModelConfig, DataConfig, OutputConfig, SPINKeys, SFTKeys, OnlineKeys),
        *(RunConfig, RunData, LaunchConfig, StopConfig),
    )
}
# Prefixes of the keys in sections of `spin run`.
PREFIXES = {"RunData": "data.", "LaunchConfig": "launch.", "StopConfig": "stop."}
# The packages of spin/alignment from the bottom up: a package imports only packages of earlier rows, and itself.
# tests/test_imports.py checks this table against the real imports.
LAYERS = (
    ("core",),
    ("data", "methods", "models"),
    ("rewards", "logprobs"),
    ("generation", "pairs", "token_weights"),
    ("training",),
    ("evaluation",),
    ("pipeline",),
    ("report",),
)
TABLE = re.compile(r"<!-- (keys|flags): (\w+)(?: / ([\w, ]+))? -->\n.*?<!-- end -->", re.DOTALL)
MAP = re.compile(r"<!-- (packages|modules|instructions) -->\n.*?<!-- end -->", re.DOTALL)
HELP = re.compile(r"<!-- help: (spin|scripts/)( ?[^ ]*) -->\n.*?<!-- end -->", re.DOTALL)
# The usage text of a shell script is between these lines.
SCRIPT_USAGE = re.compile(r"<<'TEXT'\n(.*?)\nTEXT\n", re.DOTALL)
HELP_WIDTH = "110"
RESULTS = re.compile(
    r"<!-- (results|speed|ratios|async|faults|generation|decoding|bookkeeping|scale|start|sft|evidence|plan): ([^>]+?) -->\n"
    r".*?<!-- end -->",
    re.DOTALL,
)
VALUE = re.compile(r"<!-- value: ([^/>]+) / ([^/>]+) / (\w+) -->.*?<!-- end -->")
TABLE_OF = {
    "results": results_table,
    "speed": speed_table,
    "sft": sft_table,
    "ratios": ratios_table,
    "async": async_table,
    "faults": faults_table,
    "generation": generation_table,
    "decoding": decoding_table,
    "bookkeeping": bookkeeping_table,
    "scale": scale_table,
    "start": start_table,
    "evidence": evidence_tables,
    "plan": plan_tables,
}
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def table(match: re.Match[str]) -> str:
    """Return the up-to-date text of a table of settings, markers included."""
    kind, name, groups = match.groups()
    config_class = lookup(CLASSES, name, "settings class")
    known = grouped(config_class)
    wanted = groups.split(", ") if groups else list(known)
    fields = [field for group in wanted for field in lookup(known, group, f"group of {name}")]
    prefix = "--" if kind == "flags" else PREFIXES.get(name, "")
    opening = match.group(0).partition("\n")[0]
    return f"{opening}\n{key_table(fields, config_class, prefix)}\n<!-- end -->"


def summary(path: Path) -> str:
    """Return the first paragraph of a module's docstring as one line of a Markdown table."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = " ".join(docstring.partition("\n\n")[0].split())
    # From reStructuredText to Markdown: roles such as :func:`~a.b.c` and double backquotes. A bar would end the cell.
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")
    return line.replace("|", "\\|")


def package_table() -> str:
    """Return the table of the packages of spin/alignment, one line per package, in the order of imports."""
    lines = ["| row | package | contents |", "| --- | --- | --- |"]
    for number, row in enumerate(LAYERS, start=1):
        for package in row:
            lines.append(
                f"| {number} | `{package}/` | {summary(ROOT / 'spin' / 'alignment' / package / '__init__.py')} |"
            )
    return "\n".join(lines)


def module_tables() -> str:
    """Return a table of the programs, and one of the modules of each package, with its subpackages."""
    programs = [path for path in sorted((ROOT / "spin").glob("*.py")) if path.name != "__init__.py"]
    parts = [module_table("spin", programs, ROOT / "spin")]
    for package in (name for row in LAYERS for name in row):
        folder = ROOT / "spin" / "alignment" / package
        modules = [path for path in sorted(folder.rglob("*.py")) if path != folder / "__init__.py"]
        parts.append(module_table(f"spin/alignment/{package}", modules, folder))
    return "\n\n".join(parts)


def module_table(title: str, paths: list[Path], folder: Path) -> str:
    """Return a heading and a table of modules; a subpackage's ``__init__.py`` is listed as the subpackage itself."""
    lines = [f"### `{title}/`", "", "| module | contents |", "| --- | --- |"]
    for path in paths:
        name = path.relative_to(folder).as_posix().removesuffix("__init__.py")
        lines.append(f"| `{name}` | {summary(path)} |")
    return "\n".join(lines)


def map_section(match: re.Match[str]) -> str:
    """Return the up-to-date text of a section about packages, modules or instructions, markers included."""
    kind = match.group(1)
    makers = {"packages": package_table, "modules": module_tables, "instructions": instructions_table}
    return f"<!-- {kind} -->\n{makers[kind]()}\n<!-- end -->"


def instructions_table() -> str:
    """Return the table of the kinds of verifiable instructions, with their arguments."""
    lines = ["| kind | arguments | a response that follows it |", "| --- | --- | --- |"]
    for name, function in KINDS.items():
        arguments = ", ".join(f"`{argument}`" for argument in arguments_of(function)) or "–"
        text = " ".join((function.__doc__ or "").split()).replace("``", "`")
        lines.append(f"| `{name}` | {arguments} | {text} |")
    return "\n".join(lines)


def help_section(match: re.Match[str]) -> str:
    """Return the up-to-date help of a command or a shell script, markers included."""
    program, name = match.groups()
    text = command_help(name.split()) if program == "spin" else script_help(ROOT / program / name)
    return f"<!-- help: {program}{name} -->\n```text\n{text.strip()}\n```\n<!-- end -->"


def command_help(words: list[str]) -> str:
    """Return what ``spin WORDS --help`` prints on a terminal of a fixed width."""
    printed = io.StringIO()
    fixed_width = mock.patch.dict("os.environ", COLUMNS=HELP_WIDTH)
    with fixed_width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue()


def script_help(path: Path) -> str:
    """Return the usage text of a shell script.

    Raises:
        ValueError: it has none.
    """
    found = SCRIPT_USAGE.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no usage text between <<'TEXT' and TEXT")
    return found.group(1)


def results_section(match: re.Match[str]) -> str:
    """Return the up-to-date text of a table of results, markers included."""
    kind, names = match.groups()
    text = TABLE_OF[kind](*(names.split(", ") if kind in ("ratios", "decoding", "bookkeeping") else [names]))
    return f"<!-- {kind}: {names} -->\n{text}\n<!-- end -->"


def value_section(match: re.Match[str]) -> str:
    """Return the up-to-date text of a number, markers included."""
    return f"<!-- value: {' / '.join(match.groups())} -->{value(*match.groups())}<!-- end -->"


def up_to_date(text: str) -> str:
    """Return a page with all of its generated sections up to date."""
    text = HELP.sub(help_section, MAP.sub(map_section, TABLE.sub(table, text)))
    return VALUE.sub(value_section, RESULTS.sub(results_section, text))


def main() -> None:
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = up_to_date(before)
        if after != before:
            write_text_atomic(page, after)
            print(f"wrote {page.relative_to(ROOT)}")
    if demo_plot.draw():
        print(f"wrote {demo_plot.PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
