"""The run that a report is about: its models, their lineage and its settings, whether `spin run` or the shell scripts made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.checked_json import read_checked_json
from spin.alignment.core.config import load_yaml
from spin.alignment.pipeline.stages.base import Model

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig
    from spin.alignment.pipeline.manifest import RunManifest

LineageRow = tuple[str, str, str, str]


@dataclass(frozen=True)
class ReportedRun:
    """What the report reads of a run beside the results in the folders of its models.

    ``lineage`` has (model, starts from, opponent and reference, data) per trained model. ``split`` is the split of the pairs,
    ``drops_identical`` whether responses equal to the ground truth are left out of them. ``settings`` has the sections of the
    configuration, ``manifest`` the record of the stages; the shell scripts write no manifest.
    """

    folder: Path
    models: list[Model]
    lineage: list[LineageRow]
    split: str
    drops_identical: bool
    settings: dict[str, Any] = field(default_factory=dict)
    manifest: RunManifest | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name


def open_reported_run(run_dir: str | Path) -> ReportedRun:
    """Return the run in a folder of `spin run` or of ``scripts/run_iterations.sh``.

    Raises:
        InputError: the folder contains neither, or its run.yaml is damaged.
    """
    from spin.alignment.pipeline.config import open_run

    folder = Path(run_dir)
    if not (folder / "run.yaml").is_file() and _iterations(folder):
        return run_of_scripts(folder)
    return run_of_config(open_run(run_dir))


def run_of_config(config: RunConfig) -> ReportedRun:
    """Return the run of a configuration of `spin run`."""
    from spin.alignment.pipeline.lineage import lineage
    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import make_stages, models_of

    folder = Path(config.run_dir)
    recorded = folder / "run.yaml"
    return ReportedRun(
        folder=folder,
        models=[model for model in models_of(make_stages(config)) if model.is_reported],
        lineage=lineage(config),
        split=config.data.played()[1],
        drops_identical=config.convert.get("identical") == "drop",
        settings=dict(load_yaml(recorded)) if recorded.is_file() else {},
        manifest=RunManifest(folder),
    )


def run_of_scripts(folder: Path) -> ReportedRun:
    """Return the run of ``scripts/run_iterations.sh``: a folder ``iterT`` per iteration, and ``sft`` with the evaluation of the
    model that iteration 0 starts from. The settings are those recorded by each training.
    """
    trained = _iterations(folder)
    settings = {f"iter{iteration}": _recorded_inputs(path) for iteration, path in trained.items()}
    models = [Model("sft", "start", folder / "sft")] if (folder / "sft").is_dir() else []
    lineage = []
    for iteration, path in trained.items():
        opponent = f"iter{iteration - 1}/checkpoint" if iteration - 1 in trained else "the start"
        pairs = [f"iter{number}/pairs" for number in (iteration, iteration - 1) if number in trained]
        models.append(Model(f"iter{iteration}", "policy", path, iteration, opponent, opponent, " and ".join(pairs)))
        lineage.append((f"iter{iteration}/checkpoint", opponent, opponent, " and ".join(pairs)))
    return ReportedRun(folder, models, lineage, split="train", drops_identical=False, settings=settings)


def _iterations(folder: Path) -> dict[int, Path]:
    """Return the folders of iterations that have at least pairs or a model, by number."""
    found = ((re.fullmatch(r"iter(\d+)", path.name), path) for path in folder.glob("iter*"))
    numbered = {int(match[1]): path for match, path in found if match and (path / "pairs").is_dir()}
    return dict(sorted(numbered.items()))


def _recorded_inputs(folder: Path) -> Mapping[str, Any]:
    path = folder / "checkpoint" / "inputs.json"
    if not path.exists():
        return {}
    return read_checked_json(path, f"remove {folder / 'checkpoint'} and run the script again")
