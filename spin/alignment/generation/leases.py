"""Who works on what, among processes that share nothing but a folder: heartbeats and leases, without a cluster manager.

A lease is a file that one worker creates and nobody overwrites. Its owner is alive as long as the owner's heartbeat file keeps
changing, as seen by the clock of whoever looks: the clocks of two servers are never compared. Leases save work, they do not
guard data: two workers that both believe they hold one write the same rows to files of their own, and the gathering of a
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

BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0


def _host_key() -> str:
    """Names this machine, boot and process namespace: inside it a process number means one process."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        parts.append("unknown")
    return "/".join(parts)


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None when there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Worker:
    """This process as the others see it: a name, and a heartbeat file that also says how far it is (a context manager).

    The file is rewritten every ``beat`` seconds by a thread of its own until the worker ends; a killed one stops changing.
    """

    def __init__(self, folder: Path, beat: float = BEAT_SECONDS) -> None:
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
        # Where it cannot be written nobody is misled: a heartbeat that stands still ends the leases too, only later.
        with contextlib.suppress(OSError):
            self._write("ended")

    def tell(self, **facts: Any) -> None:
        """Set what the next heartbeat says about the work."""
        self.facts = {**self.facts, **facts}

    def _beat(self) -> None:
        while not self._end.wait(self.beat):
            # A beat that a full disk or a lost mount prevents costs others' patience only; the next rows to be written stop
            # the program with the reason.
            with contextlib.suppress(OSError):
                self._write("working")

    def _write(self, state: str) -> None:
        self._count += 1
        record = {
            "worker": self.name,
            "host": _host_key(),
            "pid": os.getpid(),
            "start": _start_of(os.getpid()),
            "beat": self._count,
            "every": self.beat,
            "state": state,
            **self.facts,
        }
        # The folder is not made again: after a lost mount that would write to the disk below it.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(self.path)


def read_worker(path: Path) -> dict[str, Any] | None:
    """Return what a heartbeat file says; None when it is not there or not readable (yet)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_known_dead(record: dict[str, Any] | None) -> bool:
    """Return whether a heartbeat proves by itself that its worker works no more: it said so, or its process here is gone."""
    if record is None:
        return False
    if record.get("state") == "ended":
        return True
    if record.get("host") != _host_key() or not Path("/proc/self/stat").exists():
        return False
    return _start_of(int(record["pid"])) != record.get("start")


@dataclass
class _Sighting:
    """The last change of something, by this process's own clock."""

    value: Any
    since: float = field(default_factory=time.monotonic)


class Leases:
    """The lease files of one folder, as one worker sees and takes them."""

    def __init__(self, folder: Path, worker: Worker, patience: float = LEASE_SECONDS) -> None:
        """``patience`` is how many seconds a heartbeat may stand still before its worker counts as dead."""
        self.folder, self.worker, self.patience = folder, worker, patience
        self.held: set[str] = set()
        self._beats: dict[str, _Sighting] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def claim(self, name: str) -> bool:
        """Take a lease if nobody has it, or if its owner is dead; return whether this worker has it now."""
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
        """Give a lease of this worker back."""
        self.held.discard(name)
        if self.owner(name) == self.worker.name:
            self.path(name).unlink(missing_ok=True)

    def owner(self, name: str) -> str | None:
        """Return the worker that holds a lease; None when nobody does."""
        try:
            # A file just created may still be empty: its owner, whoever it is, is given the usual time.
            return self.path(name).read_text(encoding="utf-8") or f"unknown owner of {name}"
        except FileNotFoundError:
            return None

    def is_alive(self, owner: str) -> bool:
        """Return whether a worker may still be working: its heartbeat changed in the last ``patience`` seconds."""
        if owner == self.worker.name:
            return True
        record = read_worker(self.worker.folder / f"{owner}.json")
        if is_known_dead(record):
            return False
        beat = None if record is None else record.get("beat")
        seen = self._beats.get(owner)
        if seen is None or seen.value != beat:
            self._beats[owner] = seen = _Sighting(beat)
        return time.monotonic() - seen.since < self.patience

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # The folder is gone: what it is about is finished, or the disk is lost. Whoever looks at the work itself finds out.
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.worker.name)
        return True

    @staticmethod
    def _withdraw(path: Path) -> None:
        """Remove a dead worker's lease; of several that try, the one whose rename works goes on as if it had."""
        aside = path.with_suffix(f".{secrets.token_hex(4)}.dead")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        aside.unlink()
