"""Dividing work among processes that share only a folder: heartbeats and leases, without a cluster manager.

A lease is a file that one worker creates and no other overwrites. Its owner is alive as long as its heartbeat file keeps
changing, measured by the observer's own clock: the clocks of two servers are never compared. Leases avoid duplicate work but do
not protect data: two workers that both believe they hold a lease write the same rows to files of their own, and merging a
fraction takes each prompt once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.core.machine import has_ended, process_record

HEARTBEAT_INTERVAL = 5.0
LEASE_TIMEOUT = 60.0


class Worker:
    """Context manager that makes this process visible to others: a name, and a heartbeat file that also reports progress.

    A thread rewrites the file every ``beat`` seconds (the heartbeat interval) until the worker ends; that of a killed worker
    stops changing.
    """

    def __init__(self, folder: Path, beat: float = HEARTBEAT_INTERVAL) -> None:
        self.folder, self.beat = folder, beat
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.path = folder / f"{self.name}.json"
        self.facts: dict[str, Any] = {}
        self._count = 0
        self._end = threading.Event()

    def __enter__(self) -> Worker:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("working")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        # Not essential: if the file cannot be written, the leases expire when the heartbeat stops.
        with contextlib.suppress(OSError):
            self._write("ended")

    def tell(self, **facts: Any) -> None:
        """Set the progress reported by the next heartbeat."""
        self.facts = {**self.facts, **facts}

    def _beat(self) -> None:
        while not self._end.wait(self.beat):
            # A heartbeat missed because of a full disk or a lost mount is harmless; writing the next rows will stop the
            # program with the reason.
            with contextlib.suppress(OSError):
                self._write("working")

    def _write(self, state: str) -> None:
        self._count += 1
        record = {
            "worker": self.name,
            **process_record(),
            "beat": self._count,
            "every": self.beat,
            "state": state,
            **self.facts,
        }
        # The folder is not created again: under a lost mount point that would write to a different disk.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(self.path)


def read_worker(path: Path) -> dict[str, Any] | None:
    """Return the content of a heartbeat file; None if it does not exist, is not readable (yet) or is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("worker"), str):
        return None
    return record if isinstance(record.get("pid"), int) else None


def is_known_dead(record: dict[str, Any] | None) -> bool:
    """Return whether a heartbeat alone proves that its worker has stopped: it says so, or its process on this machine ended."""
    if record is None:
        return False
    if record.get("state") == "ended":
        return True
    return has_ended(record)


@dataclass
class _Sighting:
    """A value, and when this process saw it change, by its own clock."""

    value: Any
    since: float = field(default_factory=time.monotonic)


class Leases:
    """The lease files of one folder, from the point of view of one worker."""

    def __init__(self, folder: Path, worker: Worker, lease_timeout: float = LEASE_TIMEOUT) -> None:
        """``lease_timeout`` is the lease timeout: seconds without a heartbeat after which a worker counts as dead."""
        self.folder, self.worker, self.lease_timeout = folder, worker, lease_timeout
        self.held: set[str] = set()
        self._heartbeats: dict[str, _Sighting] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def claim(self, name: str) -> bool:
        """Take a lease if it is free or its owner is dead; return whether this worker holds it now."""
        if name in self.held:
            return True
        path = self.path(name)
        if not self._create(path):
            owner = self.owner(name)
            if owner != self.worker.name:
                if owner is not None and self.is_alive(owner):
                    return False
                self._withdraw(path)
                if not self._create(path):
                    return False
        self.held.add(name)
        return True

    def release(self, name: str) -> None:
        """Release a lease held by this worker."""
        self.held.discard(name)
        if self.owner(name) == self.worker.name:
            self.path(name).unlink(missing_ok=True)

    def owner(self, name: str) -> str | None:
        """Return the worker that holds a lease, or None."""
        try:
            # A new file may still be empty: its unknown owner gets the same lease timeout.
            return self.path(name).read_text(encoding="utf-8", errors="replace") or f"unknown owner of {name}"
        except FileNotFoundError:
            return None

    def is_alive(self, owner: str) -> bool:
        """Return whether a worker may still be working: its heartbeat changed in the last ``lease_timeout`` seconds."""
        if owner == self.worker.name:
            return True
        record = read_worker(self.worker.folder / f"{owner}.json")
        if is_known_dead(record):
            return False
        beat = None if record is None else record.get("beat")
        seen = self._heartbeats.get(owner)
        if seen is None or seen.value != beat:
            self._heartbeats[owner] = seen = _Sighting(beat)
        return time.monotonic() - seen.since < self.lease_timeout

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # The folder has been removed: the work is finished, or the disk is lost. The caller finds out when it checks.
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.worker.name)
        return True

    @staticmethod
    def _withdraw(path: Path) -> None:
        """Remove a dead worker's lease; of several workers that try, only one succeeds in renaming it."""
        aside = path.with_suffix(f".{secrets.token_hex(4)}.dead")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        aside.unlink()
