"""The conditions of a run: its settings by section, its seeds, the packages, and the machine."""

from __future__ import annotations

from typing import Any

from spin.alignment.core.parquet import open_parquet
from spin.alignment.core.provenance import read_provenance
from spin.alignment.pipeline.stages.base import flatten
from spin.alignment.report.reported_run import ReportedRun

Section = tuple[str, list[tuple[str, str]]]


def conditions(run: ReportedRun) -> list[Section]:
    """Return (heading, [(key, value)]) for the settings, seeds, packages and machine of a run."""
    general = {key: value for key, value in run.settings.items() if not isinstance(value, dict)}
    sections = {"run": general} | {key: value for key, value in run.settings.items() if isinstance(value, dict)}
    facts = [(f"settings: {name}", flatten(values)) for name, values in sections.items() if values]
    facts += [("seeds of the stages", _seeds(run)), ("packages", _packages(run))]
    if run.manifest is not None:
        facts.append(("machine", run.manifest.machine))
    return [(name, [(key, str(value)) for key, value in values.items()]) for name, values in facts if values]


def _seeds(run: ReportedRun) -> dict[str, Any]:
    if run.manifest is None:
        return {}
    return {name: record.inputs["seed"] for name, record in run.manifest.stages.items() if "seed" in record.inputs}


def _packages(run: ReportedRun) -> dict[str, str]:
    """Return the recorded versions; the shell scripts record them only in the files of responses."""
    if run.manifest is not None:
        return run.manifest.environment
    file = next((found for model in run.models for found in sorted(model.folder.glob("pairs/*.parquet"))), None)
    return {} if file is None else dict(read_provenance(open_parquet(file).schema_arrow, file).versions)
