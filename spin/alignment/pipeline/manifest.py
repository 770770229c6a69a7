"""The record of a run: which stages are done, and the inputs that they were run on."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.core.machine import describe_machine
from spin.alignment.core.provenance import hash_file, hash_json, package_versions

MANIFEST_NAME = "manifest.json"
FORMAT = 1  # of the manifest; a file without this key has format 1

# How inputs name the content of a source, and the value of one without files (a Hub name).
_CONTENT, NO_FILES = "content of ", "Hub"
State = Literal["running", "failed", "done"]


class DamagedManifest(InputError):
    """The manifest cannot be read. ``spin run`` makes a new one."""


@dataclass
class StageRecord:
    """One stage: ``inputs`` maps setting names and file names to values and content hashes.

    ``outputs`` maps paths relative to the run directory to ``{hash, size, mtime_ns}``; ``seconds`` adds up over restarts,
    and so does ``usage``, the numbers of :class:`spin.alignment.pipeline.clusters.Usage` (empty on one machine).
    """

    state: State
    inputs: dict[str, Any]
    inputs_hash: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    started_at: str = ""
    finished_at: str = ""
    usage: dict[str, float] = field(default_factory=dict)

    def add(self, seconds: float, usage: Mapping[str, float]) -> None:
        """Add what an attempt took; numbers that are 0 are not recorded."""
        self.seconds += seconds
        for name, value in usage.items():
            if value:
                self.usage[name] = self.usage.get(name, 0) + value


class RunManifest:
    """The records of one run directory. Safe to use from several threads of one process; see :func:`run_lock` for others."""

    def __init__(self, run_dir: str | Path) -> None:
        """Read ``manifest.json`` if it exists.

        Raises:
            DamagedManifest: it is not a manifest.
            InputError: it was written by a later version.
        """
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / MANIFEST_NAME
        self.stages: dict[str, StageRecord] = {}
        self.stopped: dict[str, Any] | None = None
        self._mutex = threading.RLock()
        self._hashes: dict[tuple[str, int, int], str] = {}
        if os.path.lexists(self.path):
            self.environment, self.machine, self.stages = read_records(self.path)
            self.stopped = read_stopped(self.path)
        else:
            self.environment, self.machine = package_versions(), describe_machine()

    def save(self) -> None:
        with self._mutex:
            stages = {name: asdict(record) for name, record in self.stages.items()}
            content = {
                "format": FORMAT,
                "environment": self.environment,
                "machine": self.machine,
                "stages": stages,
                **({"stopped": self.stopped} if self.stopped else {}),
            }
            write_json_atomic(self.path, content)

    def content_hash(self, path: Path) -> str:
        """Return a file's content hash; a file with unchanged size and modification time is not read again."""
        facts = path.stat()
        key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
        with self._mutex:
            if key not in self._hashes:
                # A checkpoint of several GiB is hashed once, when its stage finishes, and not by every later status or stage.
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
        """Return ``key: then -> now`` for every input that differs from the stage's record.

        Models and data are compared by content, so that another spelling of their path, or another place, is no change.
        """
        then = self.stages[stage].inputs
        before, after = by_content(then), by_content(inputs)
        then_count, now_count = Counter(before.values()), Counter(after.values())
        items = (*before.items(), *after.items())
        changed = {key for key, item in items if then_count[item] != now_count[item]}
        keys = sorted(key for key in changed if not _is_same(then.get(key), inputs.get(key)))
        return [f"{key}: {then.get(key, 'absent')} -> {inputs.get(key, 'absent')}" for key in keys]

    def is_done(self, stage: str) -> bool:
        """Return whether the stage's record is done and every output exists with the recorded content."""
        record = self.stages.get(stage)
        if record is None or record.state != "done":
            return False
        return not self.damaged_outputs(stage)

    def damaged_outputs(self, stage: str) -> list[str]:
        """Return the outputs of a stage that are missing or have changed content."""
        return [
            name
            for name, facts in self.stages[stage].outputs.items()
            if not (self.run_dir / name).is_file() or self.content_hash(self.run_dir / name) != facts["hash"]
        ]

    def start(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Record that a stage is running on these inputs."""
        with self._mutex:
            earlier = self.stages.get(stage)
            # The seconds of an interrupted attempt count only if it had the same inputs, since only then its results are used.
            resumed = earlier is not None and earlier.state != "done" and not self.changes(stage, inputs)
            hash_ = hash_json(dict(inputs))
            record = StageRecord("running", dict(inputs), hash_, started_at=now())
            if earlier is not None and resumed:
                record.add(earlier.seconds, earlier.usage)
            self.stages[stage] = record
            self.save()

    def stop(
        self, stage: str, seconds: float, interrupted: bool = False, usage: Mapping[str, float] | None = None
    ) -> None:
        """Record that a stage ended without being complete: it failed, or it was ``interrupted``, as a killed one is.

        The record of an interrupted stage is that of a running one; that nobody holds the lock of the run tells them apart.
        """
        with self._mutex:
            self.stages[stage].state = "running" if interrupted else "failed"
            self.stages[stage].add(seconds, usage or {})
            self.save()

    def stop_run(self, stopped: Mapping[str, Any] | None) -> None:
        """Record that the run ends after an iteration, and why; with None, that it goes on."""
        with self._mutex:
            self.stopped = None if stopped is None else dict(stopped)
            self.save()

    def finish(
        self, stage: str, outputs: Iterable[Path], seconds: float, usage: Mapping[str, float] | None = None
    ) -> None:
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
            record.add(seconds, usage or {})
            self.save()


def _is_same(then: Any, now: Any) -> bool:
    """Return whether two values are equal, or two spellings of one existing path (a launch configuration)."""
    if then == now or not (isinstance(then, str) and isinstance(now, str)):
        return bool(then == now)
    try:
        return Path(then).samefile(now)
    except (OSError, ValueError):
        return False


def read_records(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, StageRecord]]:
    """Return the package versions, the machine (of earlier versions: empty) and the stages in a manifest.

    Raises:
        DamagedManifest: the file is not a manifest.
        InputError: it was written by a later version.
    """
    fix = "`spin run` with the configuration of this run makes a new one and continues"
    try:
        content = read_json(path)
    except InputError as error:
        raise DamagedManifest(f"{path} is damaged: {fix}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise DamagedManifest(f"{path} is not a manifest: {fix}")
    known = {item.name for item in fields(StageRecord)}
    later = f"{path} was written by a later version of this program: continue with that version, or use a new run_dir"
    if content.get("format", FORMAT) != FORMAT:
        raise InputError(later)
    for name, record in content["stages"].items():
        if not isinstance(record, dict) or not _is_record(record):
            raise DamagedManifest(f"{path} has no valid record of {name}: {fix}")
        if not record.keys() <= known:
            raise InputError(later)
    environment, machine = (content.get(key) for key in ("environment", "machine"))
    return (
        dict(environment) if isinstance(environment, dict) else {},
        dict(machine) if isinstance(machine, dict) else {},
        {name: StageRecord(**record) for name, record in content["stages"].items()},
    )


def read_stopped(path: Path) -> dict[str, Any] | None:
    """Return the ``iteration`` after which a run stopped early, its ``best`` model and the ``reason``; None if it did not."""
    found = read_json(path).get("stopped")
    keys = {"iteration", "best", "reason"}
    return found if isinstance(found, dict) and found.keys() >= keys and isinstance(found["iteration"], int) else None


def _is_record(record: Mapping[str, Any]) -> bool:
    outputs = record.get("outputs", {})
    facts = outputs.values() if isinstance(outputs, dict) else [None]
    return (
        record.get("state") in get_args(State)
        and isinstance(record.get("inputs"), dict)
        and isinstance(record.get("inputs_hash"), str)
        and isinstance(record.get("seconds", 0.0), int | float)
        and isinstance(record.get("usage", {}), dict)
        and all(isinstance(item, dict) and {"hash", "size", "mtime_ns"} <= item.keys() for item in facts)
    )


def set_damaged_aside(run_dir: Path) -> None:
    """Move a manifest that cannot be read to ``replaced/``; the programs recognise what they have completed by its content.

    Raises:
        InputError: it was written by a later version.
    """
    try:
        RunManifest(run_dir)
    except DamagedManifest as error:
        kept = replaced_folder(run_dir) / MANIFEST_NAME
        kept.parent.mkdir(parents=True, exist_ok=True)
        (run_dir / MANIFEST_NAME).rename(kept)
        say(f"{str(error).partition(':')[0]}: every stage is checked again; the old file is kept as {kept}")


def replaced_folder(run_dir: Path) -> Path:
    """Return a new folder for what a run replaces; also if the clock shows the time of an earlier one."""
    stamp = run_dir / "replaced" / time.strftime("%Y%m%d-%H%M%S")
    others = (stamp.with_name(f"{stamp.name}-{number}") for number in itertools.count(2))
    return next(path for path in (stamp, *itertools.islice(others, 10_000)) if not path.exists())


def by_content(inputs: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return each input as a comparable (key, value), with the names of sources replaced by the hash of their content."""
    named = {
        key.removeprefix(_CONTENT): str(value)
        for key, value in inputs.items()
        if key.startswith(_CONTENT) and value != NO_FILES
    }
    # A source of prompts is named "PATH SPLIT", and settings name the path alone.
    hashes = {name.rpartition(" ")[0]: value for name, value in named.items() if " " in name} | named

    # The keys of mixers have the full path of a folder inside the run, wherever the run was.
    inside = {name.removeprefix("RUN"): value for name, value in hashes.items() if name.startswith("RUN/")}

    def neutral(text: str) -> str:
        found = hashes.get(text) or next((value for end, value in inside.items() if text.endswith(end)), None)
        return text if found is None else f"<{found}>"

    comparable = {}
    for key, value in inputs.items():
        # Paths are keys in the mixers of training programs: "dataset_mixer.PATH".
        section, dot, last = key.partition(".")
        place = (
            _CONTENT + neutral(key.removeprefix(_CONTENT))
            if key.startswith(_CONTENT)
            else section + dot + neutral(last)
        )
        shown = neutral(value) if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        comparable[key] = (place, shown)
    return comparable


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
