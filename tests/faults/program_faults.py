"""Programs with a fault at a file operation, in forks of one process that has imported everything.

A start costs hundredths of a second, so that hundreds of faults fit in minutes. ``python -m tests.faults.program_faults JSON``
prints one JSON line per fault.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from spin.alignment.core.cards import CARD_FILE
from spin.alignment.core.content_hash import is_damaged
from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import read_batches
from spin.alignment.core.program import run_program
from spin.alignment.core.provenance import SUMS_FILE, hash_weights, read_sums
from spin.alignment.training.first_loss import FIRST_LOSS_FILE
from spin.alignment.training.output_dir import KEPT_CHECKPOINTS, damaged_part
from tests.faults.file_events import NEEDS_SPACE, FileEvents, How
from tests.faults.forks import in_fork, print_reports
from tests.faults.programs import PROGRAMS, Program, contents, differing, make_inputs


@dataclass
class Outcome:
    """How a program ended: exit code (negative: the signal), what it said on stderr, and its file operations."""

    code: int
    said: str
    events: list[str]


def run_forked(work: Callable[[], Any], said: Path, events: FileEvents | None = None) -> Outcome:
    """Run something in a fork, with file operations watched by ``events``; wait for its end."""
    pid = os.fork()
    if pid == 0:
        _become(work, said, events)
    status = os.waitpid(pid, 0)[1]
    seen = said.with_suffix(".events")
    operations = json.loads(seen.read_text()) if seen.exists() else []
    seen.unlink(missing_ok=True)
    return Outcome(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), operations)


def _become(work: Callable[[], Any], said: Path, events: FileEvents | None) -> None:
    code = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = said.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        if events is not None:
            events.install()
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        if events is not None:
            said.with_suffix(".events").write_text(json.dumps(events.seen))
        os._exit(code)


class Disturbed:
    """One program and its undisturbed result, to compare those of disturbed runs with."""

    def __init__(self, program: Program, inputs: Path, folder: Path) -> None:
        self.program, self.inputs, self.folder = program, inputs, folder
        folder.mkdir(parents=True, exist_ok=True)
        outcome = self.run(folder / "undisturbed", FileEvents(folder / "undisturbed"))
        assert outcome.code == 0, outcome.said
        self.events = outcome.events
        self.expected = contents(folder / "undisturbed")

    def run(self, output: Path, events: FileEvents | None = None, before: Callable[[], None] | None = None) -> Outcome:
        def work() -> None:
            if before is not None:
                before()
            run_program(self.program.main, self.program.arguments(self.inputs, output))

        return run_forked(work, self.folder / "said.txt", events)

    def fault(self, how: How, at: int) -> dict[str, Any]:
        """Run with one fault, then again without; report what is wrong with that, if anything."""
        output = self.folder / "disturbed"
        shutil.rmtree(output, ignore_errors=True)
        first = self.run(output, FileEvents(output, at, how))
        wrong = []
        if how == "full" and first.code == 0:  # what could not be written (a last heartbeat) is not missed
            wrong += self._differences(output)
        elif how == "full" and (first.code != 2 or not is_one_sentence(first.said)):
            wrong.append(f"a full disk: exit code {first.code}: {first.said[-600:]}")
        if how == "kill" and first.code not in (-signal.SIGKILL, 0):
            wrong.append(f"ended with {first.code} before the kill: {first.said[-600:]}")
        return self._report(how, f"{at}: {self.events[at]}", output, wrong)

    def small_disk(self, size: int) -> dict[str, Any]:
        """Run where no file can be larger than ``size`` bytes, as native code feels it too."""
        output = self.folder / "disturbed"
        shutil.rmtree(output, ignore_errors=True)

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        first = self.run(output, before=limit)
        wrong = []
        if first.code not in (0, 2) or (first.code == 2 and not is_one_sentence(first.said)):
            wrong.append(f"files of at most {size} bytes: exit code {first.code}: {first.said[-600:]}")
        return self._report("small disk", str(size), output, wrong)

    def bit_flip(self, at: int, seed: int) -> dict[str, Any]:
        """Kill at an operation, flip one bit of one file that is there, and run again: equal in the end, or refused by name."""
        output = self.folder / "disturbed"
        shutil.rmtree(output, ignore_errors=True)
        self.run(output, FileEvents(output, at, "kill"))
        files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.stat().st_size]
        if not files:
            return {"how": "bit flip", "at": "nothing written yet", "wrong": []}
        chance = random.Random(seed)
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        name = str(path.relative_to(output))
        again = self.run(output)
        wrong = []
        sealed = path.name.removeprefix(".").removesuffix(".xxh3")  # of a seal, the file it belongs to
        if again.code == 2 and is_one_sentence(again.said) and sealed in again.said:
            return {"how": "bit flip", "at": f"{at}: {name}", "wrong": [], "refused": True}
        if again.code != 0:
            wrong.append(f"exit code {again.code}: {again.said[-600:]}")
        else:
            path = put_away(path)
            noticed = is_noticed(path) or has_same_rows(path, self.folder / "undisturbed" / name)
            excused = [path] if noticed else []
            if path.name == FIRST_LOSS_FILE and f"{path} is missing or damaged" in again.said:
                excused = [path, path.with_name("metrics.json")]  # which then has no first loss
            wrong += self._differences(output, excused)
        return {"how": "bit flip", "at": f"{at}: {name}", "wrong": wrong}

    def _differences(self, output: Path, excused: Sequence[Path] = ()) -> list[str]:
        """Return the files that differ from those of the undisturbed run, except some whose damage is noticed."""
        names = differing(contents(output), self.expected)
        names = [name for name in names if output / name not in excused]
        return [f"not equal: {', '.join(names[:8])}"] if names else []

    def _report(self, how: str, at: str, output: Path, wrong: list[str]) -> dict[str, Any]:
        again = self.run(output)
        if again.code != 0:
            wrong.append(f"rerun: exit code {again.code}: {again.said[-600:]}")
        else:
            wrong += self._differences(output)
        return {"how": how, "at": at, "wrong": wrong}


def put_away(path: Path) -> Path:
    """Return where a file of a checkpoint is now: a training that is complete has moved its checkpoints to ``checkpoints/``."""
    moved = path.parent.parent / KEPT_CHECKPOINTS / path.parent.name / path.name
    return moved if not path.exists() and moved.exists() else path


def has_same_rows(path: Path, expected: Path) -> bool:
    """Return whether a damaged parquet file still has the rows and the record of the undisturbed one."""
    if path.suffix != ".parquet" or not path.exists() or not expected.exists():
        return False
    try:
        found, wanted = pq.read_table(path), pq.read_table(expected)
    except (pa.ArrowException, OSError):
        return False
    return found.equals(wanted, check_metadata=True)


def is_noticed(path: Path) -> bool:
    """Return whether a damaged file that the rerun did not need would be refused or made again when it is next read."""
    if not path.exists():
        return False
    if path.name == CARD_FILE:
        return True  # for people: nothing that is computed reads it
    try:
        if path.suffix == ".parquet":
            for _ in read_batches(path):
                pass
        elif path.parent.name.startswith("checkpoint-"):
            return damaged_part(path.parent) is not None
        elif path.name == SUMS_FILE or path.name in read_sums(path.parent):
            hash_weights(path.parent)
        else:
            return is_damaged(path)
    except InputError:
        return True
    return False


def is_one_sentence(said: str) -> bool:
    """Return whether an output has exactly one error line, and no traceback."""
    return said.count("error: ") == 1 and "Traceback" not in said


def planned_faults(
    disturbed: Disturbed, counts: Mapping[str, int], seed: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield the faults of a program: ``counts`` says how many of each kind (0: none; -1: at every operation)."""
    chance = random.Random(seed)
    for how in get_args(How):
        points = [n for n, event in enumerate(disturbed.events) if how == "kill" or event.split()[0] in NEEDS_SPACE]
        wanted = counts.get(how, 0)
        for at in points if wanted < 0 else sorted(chance.sample(points, min(wanted, len(points)))):
            yield partial(disturbed.fault, how, at)
    largest = max(path.stat().st_size for path in (disturbed.folder / "undisturbed").rglob("*") if path.is_file())
    for _ in range(counts.get("small_disk", 0)):
        yield partial(disturbed.small_disk, chance.randrange(largest))
    for _ in range(counts.get("bit_flip", 0)):
        yield partial(disturbed.bit_flip, chance.randrange(len(disturbed.events)), chance.randrange(2**32))


def reports(program: str, plan: Mapping[str, int], root: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the reports of a program's faults, except the first ``plan["done"]``, which an earlier process has injected."""
    if not (root / "inputs").exists():
        assert in_fork(lambda: make_inputs(root / "inputs")) == 0
    disturbed = Disturbed(PROGRAMS[program], root / "inputs", root / program)
    faults = list(planned_faults(disturbed, plan, seed))
    yield {"how": "file operations", "count": len(disturbed.events), "planned": len(faults), "wrong": []}
    for fault in faults[plan.get("done", 0) :]:
        yield fault()
    shutil.rmtree(root / program)


if __name__ == "__main__":
    print_reports(reports)
