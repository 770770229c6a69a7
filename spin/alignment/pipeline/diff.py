"""How two runs differ: results first, then settings, data, packages and machine; hashes of outputs are counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.core.config import load_yaml
from spin.alignment.core.console import escape_controls, say, show
from spin.alignment.core.files import read_json
from spin.alignment.pipeline.manifest import RunManifest

Row = tuple[str, str, str, str]  # where, key, left, right
_RESULTS = ("greedy_exact", "sampled_exact", "nll", "mean_length")
_CONTENT, _OUTPUT = "content of ", " output"


@dataclass
class Differences:
    """The differences of two runs by what they mean. ``derived`` are contents that follow from the others: outputs of stages, and
    inputs that are outputs of other stages.
    """

    settings: list[Row] = field(default_factory=list)
    data: list[Row] = field(default_factory=list)
    environment: list[Row] = field(default_factory=list)
    derived: list[Row] = field(default_factory=list)


def differences(left: RunManifest, right: RunManifest) -> list[Row]:
    """Return (where, key, left, right) for every difference between two runs: packages, machine, inputs, outputs."""
    rows = _mapping_differences("environment", left.environment, right.environment)
    rows += _mapping_differences("machine", left.machine, right.machine)
    for stage in [*left.stages, *(name for name in right.stages if name not in left.stages)]:
        mine, theirs = left.stages.get(stage), right.stages.get(stage)
        if mine is None or theirs is None:
            rows.append((stage, "stage", mine.state if mine else "absent", theirs.state if theirs else "absent"))
            continue
        rows += _mapping_differences(stage, *(_portable_keys(run, stage) for run in (left, right)))
        hashes = [{name: facts["hash"] for name, facts in record.outputs.items()} for record in (mine, theirs)]
        rows += _mapping_differences(f"{stage}{_OUTPUT}", *hashes)
    return rows


def _portable_keys(run: RunManifest, stage: str) -> dict[str, Any]:
    """Return the inputs of a stage with paths in its keys (``dataset_mixer.PATH``) relative to where the run was made."""
    recorded = run.run_dir / "run.yaml"
    made_in = load_yaml(recorded).get("run_dir") if recorded.is_file() else None
    places = {str(run.run_dir), str(made_in or run.run_dir)}
    found = run.stages[stage].inputs
    for place in places:
        found = {key.replace(f"{place}/", "RUN/"): value for key, value in found.items()}
    return found


def _mapping_differences(where: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Row]:
    keys = sorted(key for key in {**left, **right} if left.get(key) != right.get(key))
    return [(where, key, str(left.get(key, "absent")), str(right.get(key, "absent"))) for key in keys]


def sorted_differences(rows: Iterable[Row]) -> Differences:
    """Return the differences by what they mean; a setting that differs in the same way in several iterations is one row."""
    found = Differences()
    for row in rows:
        where, key, *_ = row
        if where in ("environment", "machine"):
            found.environment.append(row)
        elif where.endswith(_OUTPUT) or key.startswith(f"{_CONTENT}RUN/"):
            found.derived.append(row)
        elif key.startswith(_CONTENT):
            found.data.append(row)
        else:
            found.settings.append(row)
    found.settings, found.data = _joined(found.settings), _joined(found.data)
    return found


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Join rows that differ only in the iteration: ``iter0/train``, ``iter1/train`` -> ``iter0-1/train``."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for where, *facts in rows:
        groups.setdefault((re.sub(r"^iter\d+", "iter", where), *facts), []).append(where)
    return [(_range_of(places), *facts) for (_, *facts), places in groups.items()]  # type: ignore[misc]


def _range_of(places: Sequence[str]) -> str:
    if len(places) == 1:
        return places[0]
    numbers = sorted(int(re.findall(r"\d+", place)[0]) for place in places)
    is_range = numbers == list(range(numbers[0], numbers[-1] + 1))
    shown = f"{numbers[0]}-{numbers[-1]}" if is_range else ",".join(map(str, numbers))
    return re.sub(r"^iter\d+", f"iter{shown}", places[0])


def result_differences(left: Path, right: Path) -> list[Row]:
    """Return the results in summary.json that differ, for models that both runs have; empty if a run has no report yet."""
    summaries = [folder / "summary.json" for folder in (left, right)]
    if not all(path.is_file() for path in summaries):
        return []
    mine, theirs = ({row["model"]: row for row in read_json(path)["rows"]} for path in summaries)
    rows = []
    for model in (name for name in mine if name in theirs):
        for key in _RESULTS:
            pair = [_value(side[model], key) for side in (mine, theirs)]
            if pair[0] != pair[1]:
                rows.append((model, key, *pair))
    return rows


def _value(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return "absent"
    low, high = row.get(f"{key}_interval", (None, None))
    return f"{row[key]:.4g}" + ("" if low is None else f" ± {(high - low) / 2:.2g}")


def show_differences(left: str, right: str, shows_all: bool = False) -> None:
    """Print how two runs differ; ``shows_all``: also the content hashes of everything that they wrote.

    Raises:
        InputError: one of the folders contains no run.
    """
    from spin.alignment.pipeline.config import open_run

    for run_dir in (left, right):
        open_run(run_dir)
    rows = differences(RunManifest(left), RunManifest(right))
    if not rows:
        say("no difference: packages, settings, inputs and outputs are equal")
        return
    found = sorted_differences(rows)
    _show_table("results", result_differences(Path(left), Path(right)), left, right)
    _show_table("settings", found.settings, left, right)
    _show_table("data and models", found.data, left, right)
    _show_table("packages and machine", found.environment, left, right)
    if shows_all:
        _show_table("outputs, and inputs that other stages wrote", found.derived, left, right)
    elif found.derived:
        say(f"{len(found.derived)} outputs, or inputs that other stages wrote, differ in content (--all lists them)")


def _show_table(title: str, rows: Sequence[Row], left: str, right: str) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table("where", "what", left, right, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape_controls, row))
    show(table)
