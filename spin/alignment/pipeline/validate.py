"""``spin validate PATH``: a data set, a model folder or a run directory against the contract. Lists every kind of problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.data_checks import data_problems, model_problems

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder


def validate(path: Path, encoder: ChatEncoder | None) -> tuple[int, list[str]]:
    """Return how many things (rows, model folders, stages) were checked and one sentence for each problem.

    With an ``encoder`` token ids are checked too: they must decode to the text and end as the finish reason says.

    Raises:
        InputError: there is nothing to check at ``path``.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a data file, a folder of them, a model folder or a run")
    if (path / "run.yaml").is_file():
        return validate_run(path)
    if (path / "config.json").is_file():
        return 1, model_problems(path)
    return data_problems(path, encoder)


def validate_run(run_dir: Path) -> tuple[int, list[str]]:
    """Check a run: the outputs of every stage that is done against the manifest, and what its kind checks beyond that."""
    from spin.alignment.pipeline.config import open_run
    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import make_stages

    config, manifest = open_run(run_dir), RunManifest(run_dir)
    problems: list[str] = []
    done = [
        stage for stage in make_stages(config) if (record := manifest.stages.get(stage.name)) and record.state == "done"
    ]
    for stage in done:
        problems += [f"{stage.name}: {name} was changed or removed" for name in manifest.damaged_outputs(stage.name)]
        problems += stage.kind.problems(stage, config)
    return len(done), problems
