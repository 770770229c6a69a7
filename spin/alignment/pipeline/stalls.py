"""Stalled programs: those that have written no output and changed no file for too long, and what each process is doing."""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PAUSE_SECONDS = 30.0  # a longer gap between two looks means that the machine or this process was stopped
_STACK_SECONDS = 2.0
_CHUNK_BYTES = 65536
_STATES = {"T": "is stopped by a signal", "t": "is stopped by a debugger", "D": "waits for a disk or device"}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
# A process with one of these on its stack waits for the other processes.
_COLLECTIVE = ("/torch/distributed/", "/deepspeed/comm/")


class StallWatch:
    """Decides whether a program makes progress: output, or a changed file in the folder of its stage."""

    def __init__(self, timeout: float, folder: Path | None) -> None:
        """``timeout`` is in seconds; 0 never reports a stall."""
        self.timeout, self._folder = timeout, folder
        self._files = self._look()
        self._progress = self._looked = time.monotonic()

    def note_output(self) -> None:
        self._progress = time.monotonic()

    def is_stalled(self) -> bool:
        """Return whether the time limit has passed without progress; call this every few seconds."""
        now = time.monotonic()
        if now - self._looked > _PAUSE_SECONDS:
            self._progress = now
        self._looked = now
        if not self.timeout or now - self._progress < self.timeout:
            return False
        # Files are only looked at when the output has been silent for the whole time. Two looks are compared, no clocks.
        before, self._files = self._files, self._look()
        if self._files != before:
            self._progress = now
        return self._files == before

    def _look(self) -> tuple[int, int, int]:
        if not self.timeout or self._folder is None:
            return (0, 0, 0)
        facts = []
        for path in self._folder.rglob("*"):
            try:
                facts.append(path.stat())
            except OSError:  # removed meanwhile
                continue
        return len(facts), sum(item.st_size for item in facts), max((item.st_mtime_ns for item in facts), default=0)


@dataclass(frozen=True)
class StalledProcess:
    """A process of a stalled program: its rank if it has one, its state (a letter of /proc), and its stack if it wrote one."""

    pid: int
    rank: str | None
    state: str
    stack: str

    @property
    def name(self) -> str:
        return f"process {self.pid}" if self.rank is None else f"rank {self.rank} (process {self.pid})"

    @property
    def is_waiting_for_others(self) -> bool:
        return any(part in self.stack for part in _COLLECTIVE)

    @property
    def description(self) -> str:
        if self.state in _STATES:
            return f"{self.name} {_STATES[self.state]}"
        frames = [found for line in self.stack.splitlines() if (found := _FRAME.search(line))]
        where = f"{Path(frames[0]['file']).name} line {frames[0]['line']} in {frames[0]['function']}" if frames else ""
        return f"{self.name} is at {where}" if where else self.name


def examine(pids: Sequence[int], output: BinaryIO) -> list[StalledProcess]:
    """Ask processes for their stacks, one after the other, and return what each of them is doing.

    ``output`` is the read end of the pipe that they write to. Only processes that handle SIGUSR1 are sent it.
    """
    found = []
    for pid in pids:
        state = process_state(pid)
        stack = ""
        if state not in _STATES and _handles(pid, signal.SIGUSR1):
            try:
                os.kill(pid, signal.SIGUSR1)
            except ProcessLookupError:
                continue
            stack = _read_for(output, _STACK_SECONDS)
        found.append(StalledProcess(pid, _environment(pid).get("RANK"), state, stack))
    return found


def culprits(processes: Sequence[StalledProcess]) -> list[StalledProcess]:
    """Return the processes that do not wait for others; all of those with a rank if nothing tells them apart."""
    ranked = [item for item in processes if item.rank is not None] or [item for item in processes if item.stack]
    stopped = [item for item in processes if item.state in _STATES]
    busy = [item for item in ranked if not item.is_waiting_for_others]
    return stopped or busy or ranked


def process_state(pid: int) -> str:
    """Return the letter of a process's state, as in /proc; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _handles(pid: int, number: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _environment(pid: int) -> dict[str, str]:
    try:
        items = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def _read_for(output: BinaryIO, seconds: float) -> str:
    """Return what is written within some seconds; half a second of silence after the first text ends it."""
    text, deadline, poll = b"", time.monotonic() + seconds, select.poll()
    poll.register(output, select.POLLIN)
    while time.monotonic() < deadline and poll.poll(500 if text else seconds * 1000):
        chunk = os.read(output.fileno(), _CHUNK_BYTES)
        if not chunk:
            break
        text += chunk
    return text.decode(errors="replace")
