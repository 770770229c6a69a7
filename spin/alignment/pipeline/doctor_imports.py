"""Imports of packages, each in a process of its own: a broken one may abort it.

One interpreter imports torch and transformers, which nearly all of them need, and forks a process for each import.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from spin.alignment.core.errors import InputError

_TIMEOUT_SECONDS = 60
_CHECKS = "from spin.alignment.pipeline.doctor_imports import run_checks; run_checks()"


@dataclass(frozen=True)
class ImportResult:
    """Whether a statement worked, and what it printed; of one that did not, the last line of its error."""

    name: str
    works: bool
    said: str


class ImportChecks:
    """Context manager: checks statements in other processes from its start; :meth:`results` returns each as it is known."""

    def __init__(self, statements: Mapping[str, str]) -> None:
        self.statements = statements

    def __enter__(self) -> ImportChecks:
        self._checks = subprocess.Popen(
            [sys.executable, "-c", _CHECKS, json.dumps(dict(self.statements))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checks.kill()
        self._checks.communicate()

    def results(self) -> Iterator[ImportResult]:
        """Yield the result of every statement; if the process that imports torch ends early, that is the result of the rest."""
        left = dict(self.statements)
        assert self._checks.stdout is not None and self._checks.stderr is not None
        for line in self._checks.stdout:
            result = ImportResult(**json.loads(line))
            del left[result.name]
            yield result
        reason = (self._checks.stderr.read().strip().splitlines() or [f"exit code {self._checks.wait()}"])[-1]
        for name in left:
            yield ImportResult(name, False, f"importing torch and transformers ends Python ({reason})")


def run_checks() -> None:
    """Check the statements given as the first argument, as many at a time as there are cores; print results as JSON lines."""
    statements = json.loads(sys.argv[1])
    with contextlib.suppress(Exception):  # the statements that need it fail with the reason
        import torch  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    running: dict[int, tuple[str, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, statement) in enumerate(statements.items()):
            if len(running) >= len(os.sched_getaffinity(0)):
                _report(running)
            output = Path(folder) / str(number)
            pid = os.fork()
            if pid == 0:
                _check(statement, output)
            running[pid] = name, output
        while running:
            _report(running)


def _check(statement: str, output: Path) -> None:
    """Run a statement in this forked process, which ends here; what it prints goes to ``output``, its error to output.err."""
    signal.alarm(_TIMEOUT_SECONDS)
    for descriptor, path in ((1, output), (2, output.with_suffix(".err"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    code = 1
    try:
        exec(statement, {})
        sys.stdout.flush()
        code = 0
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def _report(running: dict[int, tuple[str, Path]]) -> None:
    """Wait until one of the processes has ended, and print its result."""
    pid, status = os.wait()
    name, output = running.pop(pid)
    code = os.waitstatus_to_exitcode(status)
    said = (output if code == 0 else output.with_suffix(".err")).read_text(errors="replace").strip().splitlines()
    if code == -signal.SIGALRM:
        said = [f"no answer within {_TIMEOUT_SECONDS} s"]
    elif code < 0:
        said = [f"ended by {signal.Signals(-code).name}"]
    text = "; ".join(said) if code == 0 else (said or ["no message"])[-1]
    sys.stdout.write(json.dumps({"name": name, "works": code == 0, "said": text}) + "\n")
    sys.stdout.flush()
