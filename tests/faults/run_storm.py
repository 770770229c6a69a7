"""``spin run`` disturbed: by random signals, by a second run on its directory, by clocks.

A signal goes to the pipeline alone, to one of its descendants (a program, a data worker, the start server), or to all of them at
once, as a power cut would. The same command is then given again, until the run is finished; its files must equal those of a run
that nobody disturbed. ``python -m tests.faults.run_storm JSON`` prints one JSON line per signal and per finished run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.faults.forked_run import fork_run
from tests.faults.forks import in_fork, print_reports
from tests.faults.programs import contents, differing, make_run
from tests.helpers import REPOSITORY, program_environment

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("pipeline", "descendant", "all")
_LONGEST_SECONDS = 600.0
_JUMPING_CLOCK = REPOSITORY / "tests" / "faults" / "jumping_clock"


class RunStorm:
    """One kind of run in one folder, disturbed again and again.

    With ``spares_server`` no signal goes to the start server alone: the run would go on, but every later program would import
    the libraries itself, for minutes (the long form waits for that; so does ``tests/pipeline/test_start_fallbacks.py``).
    """

    def __init__(self, kind: str, folder: Path, seed: str, spares_server: bool = False) -> None:
        self.spares_server = spares_server
        self.folder, self.chance = folder, random.Random(f"{kind} {seed}")
        folder.mkdir(parents=True)
        self.config = folder / "run.yaml"
        # In a fork: torch would start threads in this process, which no fork survives.
        assert in_fork(lambda: make_run(folder, kind)) == 0
        self.run_dir, self.output = folder / "run", folder / "said.txt"
        started = time.monotonic()
        assert self.start().wait(_LONGEST_SECONDS) == 0, self.said()
        self.seconds = time.monotonic() - started
        self.expected = contents(self.run_dir)

    def start(self) -> psutil.Process:
        return fork_run(self.config, self.output)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def signals(self, count: int) -> Iterator[dict[str, Any]]:
        """Send ``count`` signals, over as many runs as that takes; yield a report of each, and of each finished run."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        sent = 0
        while sent < count:
            process = self.start()
            code = None
            with contextlib.suppress(psutil.TimeoutExpired):
                code = process.wait(self.chance.uniform(0.1, self.seconds))
            if code is None:
                sent += 1
                yield self._signal(process)
            else:
                yield self._finished(code)
                shutil.rmtree(self.run_dir, ignore_errors=True)
        yield self._finished(self.start().wait(_LONGEST_SECONDS))

    def _signal(self, process: psutil.Process) -> dict[str, Any]:
        chosen, target = self.chance.choice(SIGNALS), self.chance.choice(TARGETS)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = process.children(recursive=True)
            single = [child for child in children if not self.spares_server or child.ppid() != process.pid]
            if target == "descendant" and not single:
                target = "pipeline"
            goals = {"pipeline": [process], "descendant": single, "all": [process, *children]}[target]
            if target == "descendant":
                goals = [self.chance.choice(goals)]
            for goal in goals:
                with contextlib.suppress(psutil.NoSuchProcess):
                    goal.send_signal(chosen)
        report = {"how": f"{chosen.name} to {target}", "wrong": []}
        try:
            report["code"] = process.wait(_LONGEST_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()
            report["wrong"] = [f"still runs {_LONGEST_SECONDS:.0f} s later: {self.said()[-600:]}"]
        # The log of a program that was interrupted may hold its traceback; the pipeline itself must have none.
        if "spin/cli.py" in self.said():
            report["wrong"] = [f"a traceback: {self.said()[-1500:]}"]
        return report

    def _finished(self, code: int | None, how: str = "finished") -> dict[str, Any]:
        wrong = [f"exit code {code}: {self.said()[-1500:]}"] if code else []
        names = differing(contents(self.run_dir), self.expected) if not code else []
        if names:
            wrong.append(f"not equal: {', '.join(names[:8])}")
        return {"how": how, "wrong": wrong}

    def changed_dates(self) -> dict[str, Any]:
        """Date the files of the finished run in the past or the future: they are the same files, and nothing is done again."""
        for number, path in enumerate(sorted(self.run_dir.rglob("*"))):
            os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
        report = self._finished(self.start().wait(_LONGEST_SECONDS), "changed dates")
        if "/train: done in" in self.said():
            report["wrong"].append(f"done again: {self.said()[-1500:]}")
        return report

    def jumping_clock(self) -> dict[str, Any]:
        """Run from the start, as a plain new process, where the clock jumps at every reading."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        command = [sys.executable, "-m", "spin", "run", str(self.config)]
        environment = program_environment(PYTHONPATH=f"{_JUMPING_CLOCK}:{REPOSITORY}")
        with self.output.open("wb") as said:
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=said, stderr=said, check=False)
        return self._finished(done.returncode, "jumping clock")

    def twice(self) -> dict[str, Any]:
        """Run from the start, two at once: one does it, the other is refused in one sentence."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        other = self.folder / "said_by_the_other.txt"
        both = [self.start(), fork_run(self.config, other)]
        codes = [process.wait(_LONGEST_SECONDS) for process in both]
        said = [self.said(), other.read_text(errors="replace")]
        report = self._finished(min(codes), "two runs on one directory")
        refused = said[codes.index(max(codes))]
        if sorted(codes) != [0, 2] or "another" not in refused or "Traceback" in "".join(said):
            report["wrong"].append(f"exit codes {codes}: {refused[-1500:]}")
        return report


def reports(part: str, plan: Mapping[str, Any], root: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the reports of one kind of run: of the signals that an earlier process has not sent, and of other disturbances."""
    done = plan.get("done", 0)
    storm = RunStorm(part.removeprefix("spin-run-"), root / part, f"{seed} {done}", plan.get("spares_server", False))
    yield {"how": "undisturbed", "planned": plan["signals"], "wrong": []}
    if plan.get("others"):
        yield storm.changed_dates()
        yield storm.twice()
        yield storm.jumping_clock()
    yield from storm.signals(plan["signals"] - done)
    shutil.rmtree(root / part)


if __name__ == "__main__":
    print_reports(reports)
