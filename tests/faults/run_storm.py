"""``spin run`` under random signals: python -m tests.faults.run_storm JSON. Prints one JSON line per signal and per finished run.

A signal goes to the pipeline alone, to one of its descendants (a program, a data worker, the start server), or to all of them at
once, as a power cut would. The same command is then given again, until the run is finished; its files must equal those of a run
that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.faults.programs import contents, differing, make_run
from tests.helpers import REPOSITORY, hear_ctrl_c, program_environment

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TARGETS = ("pipeline", "descendant", "all")
_LONGEST_SECONDS = 600.0


class RunStorm:
    """One kind of run in one folder, disturbed again and again."""

    def __init__(self, kind: str, folder: Path, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(f"{kind} {seed}")
        folder.mkdir(parents=True, exist_ok=True)
        self.config = make_run(folder, kind)
        self.run_dir = folder / "run"
        started = time.monotonic()
        process = self.start()
        assert process.wait(_LONGEST_SECONDS) == 0, self.said()
        self.seconds = time.monotonic() - started
        self.expected = contents(self.run_dir)
        shutil.rmtree(self.run_dir)

    def start(self) -> subprocess.Popen[bytes]:
        """Start ``spin run`` in a session of its own."""
        with (self.folder / "said.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "spin", "run", str(self.config)],
                cwd=REPOSITORY,
                env=program_environment(PYTHONPATH=str(REPOSITORY)),
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=hear_ctrl_c,
            )

    def said(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")

    def signals(self, count: int) -> Iterator[dict[str, Any]]:
        """Send ``count`` signals, over as many runs as that takes; yield a report of each, and of each finished run."""
        sent = 0
        while sent < count:
            process = self.start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.chance.uniform(0.2, self.seconds))
            if process.poll() is None:
                sent += 1
                yield self._signal(process, sent)
            else:
                yield self._finished(process.returncode)
        yield self._finished(self.start().wait(_LONGEST_SECONDS))

    def _signal(self, process: subprocess.Popen[bytes], number: int) -> dict[str, Any]:
        chosen, target = self.chance.choice(SIGNALS), self.chance.choice(TARGETS)
        pipeline = psutil.Process(process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            children = pipeline.children(recursive=True)
            if target == "descendant" and not children:
                target = "pipeline"
            goals = {"pipeline": [pipeline], "descendant": children, "all": [pipeline, *children]}[target]
            if target == "descendant":
                goals = [self.chance.choice(goals)]
            for goal in goals:
                with contextlib.suppress(psutil.NoSuchProcess):
                    goal.send_signal(chosen)
        report = {"how": f"{chosen.name} to {target}", "number": number, "wrong": []}
        try:
            report["code"] = process.wait(_LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            report["wrong"] = [f"still runs {_LONGEST_SECONDS:.0f} s later: {self.said()[-600:]}"]
        # The log of a program that was interrupted may hold its traceback; the pipeline itself must have none.
        if "spin/cli.py" in self.said():
            report["wrong"] = [f"a traceback: {self.said()[-1500:]}"]
        return report

    def _finished(self, code: int) -> dict[str, Any]:
        wrong = [f"exit code {code}: {self.said()[-1500:]}"] if code else []
        names = differing(contents(self.run_dir), self.expected) if not code else []
        if names:
            wrong.append(f"not equal: {', '.join(names[:8])}")
        if code == 0:
            shutil.rmtree(self.run_dir)
        return {"how": "finished", "wrong": wrong}


def main() -> None:
    settings = json.loads(sys.argv[1])
    storm = RunStorm(settings["kind"], Path(settings["root"]) / settings["kind"], settings["seed"])
    print(json.dumps({"how": "undisturbed", "seconds": round(storm.seconds, 1), "wrong": []}), flush=True)
    for report in storm.signals(settings["count"]):
        print(json.dumps({**report, "kind": settings["kind"]}), flush=True)


if __name__ == "__main__":
    main()
