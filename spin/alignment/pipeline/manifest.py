"""The record of a run: which stage is done, and what it was made from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.core.provenance import hash_file, hash_json, package_versions

MANIFEST_NAME = "manifest.json"

State = Literal["running", "failed", "done"]


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
    """The records of one run directory. Safe to use from several threads of one process; see :func:`run_lock` for others."""

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
