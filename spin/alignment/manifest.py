"""The run directory: which stage is done, from which inputs, and whether its output is still what was written.

``manifest.json`` holds one record per stage. It is written after the stage's output, so a record in state ``done`` proves
completion; a stage is skipped exactly when its record is done, its inputs are unchanged and its outputs have their content.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from spin.alignment.errors import InputError
from spin.alignment.provenance import hash_file, hash_json, package_versions
from spin.alignment.shards import read_json, write_json_atomic

MANIFEST_NAME = "manifest.json"
RUN_VARIABLE = "SPIN_RUN_DIRECTORY"
# What makes a saved model: a checkpoint folder also holds logs and trainer state, which say nothing about the next stage.
MODEL_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
_TERMINATION_SECONDS = 20.0

State = Literal["running", "failed", "done"]


def model_files(folder: str | Path) -> list[Path]:
    """Return the files that make a saved model, in order of their names."""
    return sorted({path for pattern in MODEL_PATTERNS for path in Path(folder).glob(pattern) if path.is_file()})


@dataclass
class StageRecord:
    """One stage: ``inputs`` maps setting names and file names to values and content hashes.

    ``outputs`` maps paths relative to the run directory to ``{hash, size, mtime_ns}``; ``seconds`` adds up over restarts.
    """

    state: State
    inputs: dict[str, Any]
    inputs_hash: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    started_at: str = ""
    finished_at: str = ""


class RunManifest:
    """The records of one run directory. Safe to use from several threads of one process; see :class:`RunLock` for others."""

    def __init__(self, run_dir: str | Path) -> None:
        """Read ``manifest.json`` when there is one.

        Raises:
            InputError: it is damaged, or of a newer format.
        """
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / MANIFEST_NAME
        self.stages: dict[str, StageRecord] = {}
        self.environment = package_versions()
        self._mutex = threading.RLock()
        self._hashes: dict[tuple[str, int, int], str] = {}
        if self.path.exists():
            content = read_json(self.path)
            try:
                self.environment = dict(content["environment"])
                self.stages = {name: StageRecord(**record) for name, record in content["stages"].items()}
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self.path} is not a manifest of this version ({error}): use a new run_dir"
                ) from error

    def save(self) -> None:
        with self._mutex:
            stages = {name: asdict(record) for name, record in self.stages.items()}
            write_json_atomic(self.path, {"environment": self.environment, "stages": stages})

    def content_hash(self, path: Path) -> str:
        """Return a file's content hash; an unchanged size and modification time spare reading it again."""
        facts = path.stat()
        key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
        with self._mutex:
            if key not in self._hashes:
                known = self._recorded(path)
                same = known and (known["size"], known["mtime_ns"]) == key[1:]
                self._hashes[key] = known["hash"] if known and same else hash_file(path)
            return self._hashes[key]

    def _recorded(self, path: Path) -> dict[str, Any] | None:
        if not path.is_relative_to(self.run_dir):
            return None
        name = str(path.relative_to(self.run_dir))
        return next((record.outputs[name] for record in self.stages.values() if name in record.outputs), None)

    def content_hashes(self, paths: Iterable[Path]) -> str:
        """Return one hash of several files: names and contents."""
        return hash_json({path.name: self.content_hash(path) for path in paths})

    def changes(self, stage: str, inputs: Mapping[str, Any]) -> list[str]:
        """Return ``key: then -> now`` for every input that differs from what the stage's record was made from."""
        then = self.stages[stage].inputs
        keys = [key for key in {**then, **inputs} if then.get(key) != inputs.get(key)]
        return [f"{key}: {then.get(key, 'absent')} -> {inputs.get(key, 'absent')}" for key in sorted(keys)]

    def is_done(self, stage: str) -> bool:
        """Return whether the stage's record is done and every output is there with the recorded content."""
        record = self.stages.get(stage)
        if record is None or record.state != "done":
            return False
        return not self.damaged_outputs(stage)

    def damaged_outputs(self, stage: str) -> list[str]:
        """Return the outputs of a stage that are gone or have another content."""
        return [
            name
            for name, facts in self.stages[stage].outputs.items()
            if not (self.run_dir / name).is_file() or self.content_hash(self.run_dir / name) != facts["hash"]
        ]

    def start(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Record that a stage is running on these inputs."""
        with self._mutex:
            earlier = self.stages.get(stage)
            resumed = earlier is not None and earlier.state != "done" and earlier.inputs == dict(inputs)
            seconds = earlier.seconds if earlier is not None and resumed else 0.0
            hash_ = hash_json(dict(inputs))
            self.stages[stage] = StageRecord("running", dict(inputs), hash_, seconds=seconds, started_at=now())
            self.save()

    def stop(self, stage: str, seconds: float) -> None:
        """Record that a stage ended without being complete."""
        with self._mutex:
            self.stages[stage].state = "failed"
            self.stages[stage].seconds += seconds
            self.save()

    def finish(self, stage: str, outputs: Iterable[Path], seconds: float) -> None:
        """Record a complete stage with the content of its outputs; the last thing a stage does."""
        facts = {}
        for path in sorted(outputs):
            stat = path.stat()
            facts[str(path.relative_to(self.run_dir))] = {
                "hash": self.content_hash(path),
                "size": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
            }
        with self._mutex:
            record = self.stages[stage]
            record.state, record.outputs, record.finished_at = "done", facts, now()
            record.seconds += seconds
            self.save()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunLock:
    """One ``spin run`` per directory (a context manager). The kernel drops the lock of a dead holder.

    Children of a holder that was killed are ended first: they would write into the same files.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / ".lock"

    def __enter__(self) -> RunLock:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise InputError(
                f"{self.run_dir} is in use by process {holder}: wait for it, or choose another run_dir"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        end_processes(orphans(self.run_dir))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @staticmethod
    def is_held(run_dir: str | Path) -> bool:
        """Return whether a living ``spin run`` holds the directory."""
        path = Path(run_dir) / ".lock"
        if not path.exists():
            return False
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def orphans(run_dir: Path) -> list[int]:
    """Return the processes that an earlier ``spin run`` of this directory started (marked in their environment)."""
    mark = f"{RUN_VARIABLE}={run_dir.resolve()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            marked = mark in entry.read_bytes().split(b"\0")
        except OSError:
            continue  # another user's process, or one that ended meanwhile
        if marked and int(entry.parent.name) != os.getpid():
            found.append(int(entry.parent.name))
    return found


def end_processes(pids: list[int]) -> None:
    """Ask processes to end, and kill those that do not within 20 seconds."""
    _signal_all(pids, signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATION_SECONDS
    while (pids := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_all(pids, signal.SIGKILL)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def differences(left: RunManifest, right: RunManifest) -> list[tuple[str, str, str, str]]:
    """Return (where, key, left, right) for everything two runs were not made alike in: packages, inputs, outputs."""
    rows = _mapping_differences("environment", left.environment, right.environment)
    for stage in [*left.stages, *(name for name in right.stages if name not in left.stages)]:
        mine, theirs = left.stages.get(stage), right.stages.get(stage)
        if mine is None or theirs is None:
            rows.append((stage, "stage", mine.state if mine else "absent", theirs.state if theirs else "absent"))
            continue
        rows += _mapping_differences(stage, mine.inputs, theirs.inputs)
        hashes = [{name: facts["hash"] for name, facts in record.outputs.items()} for record in (mine, theirs)]
        rows += _mapping_differences(f"{stage} output", *hashes)
    return rows


def _mapping_differences(
    where: str, left: Mapping[str, Any], right: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    keys = sorted(key for key in {**left, **right} if left.get(key) != right.get(key))
    return [(where, key, str(left.get(key, "absent")), str(right.get(key, "absent"))) for key in keys]
