"""Runs one part of the suite in a process of its own, so that its crash, its lack of memory or its hang ends only that part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Findings
from benchmarks.harness import REPOSITORY
from spin.alignment.core.files import read_json
from spin.alignment.core.program import end_with_parent, interrupt_on_signals

GRACE_SECONDS = 5.0  # for a part to end the processes that it started
LOG_LINES = 15


def run_part(name: str, seconds: float, tiny: bool, folder: Path) -> dict[str, Any]:
    """Run a part for at most ``seconds`` and a few for its end; return its entry in the JSON file.

    ``status`` is done, failed or timed out; ``results`` are those recorded until then, ``error`` is the end of its output.
    """
    folder.mkdir()
    results, log = folder / "results.json", folder / "log.txt"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.process", name, json.dumps(tiny), str(results)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)},  # removed even if the part is killed
            start_new_session=True,
        )
    code: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
    finally:
        _end(process)
    entry: dict[str, Any] = {"status": "done", "seconds": time.monotonic() - started}
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        entry["status"] = "timed out" if code is None else "failed"
        entry["error"] = "\n".join([_how(code, seconds), *lines[-LOG_LINES:]])
    return entry | {"results": read_json(results) if results.exists() else {}}


def _how(code: int | None, seconds: float) -> str:
    if code is None:
        return f"stopped after {seconds:.0f} seconds; the end of its output:"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; the end of its output:"
    return f"ended with code {code}; the end of its output:"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: ask first, then kill whatever is left of its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    from benchmarks.gpu.parts import PARTS

    end_with_parent()
    interrupt_on_signals()
    name, tiny, file = sys.argv[1:]
    findings = Findings(Path(file), json.loads(tiny))
    PARTS[name].run(findings)
    if findings.failed:
        raise SystemExit(f"failed: {', '.join(findings.failed)} (see results)")


if __name__ == "__main__":
    main()
