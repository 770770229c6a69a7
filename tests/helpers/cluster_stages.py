"""Stages whose programs are small scripts, for tests of clusters."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stage_program import Spread
from spin.alignment.pipeline.stages import Stage, StageKind


class Script(StageKind):
    """A kind whose program is a file with some code, started with one argument: a folder."""

    def __init__(self, path: Path, spread: Spread) -> None:
        self.program, self.spread = str(path), spread

    def arguments(self, stage: Stage, config: Any) -> list[str]:
        return [config]


def script_stage(folder: Path, code: str, launch: LaunchConfig, spread: Spread = "workers") -> Stage:
    """Return the stage a/b of a program with this code, after ``folder = Path(sys.argv[1])``, which is its folder."""
    path = folder / "program.py"
    output = folder / "run" / "a"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os, signal, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{code}")
    return Stage(
        kind=Script(path, spread),
        name="a/b",
        configs=[str(output)],
        settings={},
        sources=[],
        outputs=list,
        folder=output,
        launch=launch,
    )


class Running:
    """A stage that runs in a thread; ``code`` is its exit code, or what it raised."""

    def __init__(self, cluster: Any, stage: Stage) -> None:
        self.code: Any = None

        def run() -> None:
            try:
                self.code = cluster.run(stage, stage.configs[0])
            except Exception as error:
                self.code = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def result(self, seconds: float = 60.0) -> Any:
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return self.code


# Code of a worker that the first process to run it takes part in for a minute, and that every later one finishes at once.
FIRST_HANGS = """
try:
    (folder / "first").mkdir()
except FileExistsError:
    while not (folder / "lost").exists():
        time.sleep(0.05)
    print("finished the work")
    sys.exit(0)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
