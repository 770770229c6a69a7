"""The tasks of one program: started together, followed, started again after a loss, and ended together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED
from spin.alignment.pipeline.clusters.base import Usage
from spin.alignment.pipeline.clusters.handle import Ending, Handle
from spin.alignment.pipeline.clusters.task import Task
from spin.alignment.pipeline.processes import ProgramEnded, ProgramStalled, log_path
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.pipeline.stage_output import StageOutput
from spin.alignment.pipeline.stage_program import StageProgram

LOOK_SECONDS = 1.0
_WAITING_SECONDS = 60.0  # between two lines that say that nothing has started yet
_FINISH_SECONDS = 60.0  # for workers that find all work done
_CANCEL_SECONDS = 30.0
_FILE_SECONDS = 5.0  # until a file that another machine has written is visible here
_LAST_LINES = 30


class ProgramLost(ProgramEnded):
    """A task was lost with its machine, or ended from outside, as often as ``launch.retries`` allows."""


@dataclass(frozen=True)
class TeamSettings:
    """What a team is told by its cluster.

    Attributes:
        folder: where the stage writes, or None.
        task_folder: returns a new folder for a task of this name; every attempt has its own.
        start: hands a task to the cluster, which starts it when there are machines for it.
        wait: waits some seconds; returns whether the run is to stop.
        is_hurried: whether programs that are being ended are killed at once.
    """

    stage: str
    folder: Path | None
    run_dir: Path
    launch: LaunchConfig
    task_folder: Callable[[str], Path]
    start: Callable[[Task], Handle]
    wait: Callable[[float], bool]
    is_hurried: Callable[[], bool]
    look: Callable[[str, str], None]


@dataclass
class Member:
    """One task of a team, through all its attempts."""

    number: int
    task: Task
    handle: Handle
    restarts: int
    is_done: bool = False
    started: float | None = None
    read: dict[Path, int] = field(default_factory=dict)  # bytes of each output that have been shown
    pending: dict[Path, bytes] = field(default_factory=dict)  # the line that is not complete yet


class Team:
    """The tasks of one program of a stage, each with some of its processes.

    ``usage`` is what they have taken, ``failed_log`` the log of one that failed.
    """

    def __init__(self, settings: TeamSettings, program: StageProgram, output: StageOutput) -> None:
        self.settings, self.program, self.output = settings, program, output
        self.parts = program.workers()
        self.usage = Usage()
        self.failed_log: Path | None = None
        self._members: list[Member] = []
        self._finish_by: float | None = None
        self._waiting_since = time.monotonic()

    def run(self) -> int:
        """Run the program and wait for it; return its exit code.

        Workers are done when one of them is, as it ends only when all work is done.

        Raises:
            ProgramStalled: it made no progress for too long.
            ProgramLost: its machines were lost too often.
            InputError: the cluster cannot run it as it is configured.
        """
        try:
            for number in range(len(self.parts)):
                self._members.append(self._new_member(number))
            while (code := self._look()) is None:
                self.settings.look(self.settings.stage, self.output.activity)
                if self.settings.wait(LOOK_SECONDS):
                    return EXIT_INTERRUPTED
            return code
        finally:
            self._end()

    def _new_member(self, number: int, restarts: int = 0) -> Member:
        own, name = self.settings, f"{self.settings.stage}.{number}"
        task = Task(
            name=name,
            folder=own.task_folder(name),
            program=self.parts[number],
            run_dir=own.run_dir,
            cwd=Path.cwd(),
            watched=None if own.folder is None else own.folder.resolve(),
            stall_timeout=own.launch.stall_timeout,
            shows_name=len(self.parts) > 1,
        )
        task.write()
        self.output.log(f"task {name}: {task.program.name} {' '.join(task.program.arguments)}\n".encode())
        return Member(number, task, own.start(task), restarts)

    def _look(self) -> int | None:
        """Look at every task once; return the exit code of the program when it is known."""
        for member in self._unfinished():
            self._follow(member)
            ending = member.handle.poll()
            if ending is None:
                continue
            self._follow(member)
            self._count(member)
            member.is_done = True
            if ending.is_success:
                self._finish_by = self._finish_by or time.monotonic() + _FINISH_SECONDS
            elif self._finish_by is None and (code := self._failed(member, ending)) is not None:
                return code
        left = self._unfinished()
        if self._finish_by is not None:  # those that have not even started will find nothing to do
            is_late = time.monotonic() > self._finish_by
            left = [member for member in left if member.started is not None and not is_late]
        self._say_waiting(left)
        return None if left else EXIT_DONE

    def _unfinished(self) -> list[Member]:
        return [member for member in self._members if not member.is_done]

    def _follow(self, member: Member) -> None:
        """Show what a task has written since the last look, in whole lines."""
        if member.started is None and member.task.has_started():
            member.started = time.monotonic()
        for path in member.task.outputs():
            with path.open("rb") as file:
                file.seek(member.read.get(path, 0))
                chunk = file.read()
            member.read[path] = member.read.get(path, 0) + len(chunk)
            whole, end, rest = (member.pending.get(path, b"") + chunk).rpartition(b"\n")
            member.pending[path] = rest
            self.output.write(whole + end)

    def _failed(self, member: Member, ending: Ending) -> int | None:
        """Start a task again that failed or was lost; return the exit code of the program if it must not.

        Raises:
            ProgramStalled, ProgramLost, InputError: see :meth:`run`.
        """
        if ending.refusal:
            raise InputError(ending.refusal)
        found = _endings(member.task)
        codes = {rank: int(item["code"]) for rank, item in found.items()}
        if EXIT_BAD_INPUT in codes.values():
            return EXIT_BAD_INPUT
        failed = {rank: code for rank, code in codes.items() if code not in (EXIT_DONE, EXIT_INTERRUPTED)}
        rank = min(failed or codes or [0])
        self.failed_log = log_path(self.settings.run_dir, member.task.log_name(rank))
        if stalled := next((item["reason"] for item in found.values() if item["reason"]), ""):
            raise ProgramStalled(stalled)
        lost = f"was lost ({ending.reason or 'it was ended from outside'})"
        why = f"failed with exit code {failed[rank]}" if failed else lost
        if member.restarts < self.settings.launch.retries:
            self._restart(member, why)
            return None
        if failed:
            return failed[rank]
        self._show_last_lines(self.failed_log)
        raise ProgramLost(f"its task {member.task.name} {why} after {member.restarts} restarts (launch.retries)")

    def _restart(self, member: Member, why: str) -> None:
        restarts, retries = member.restarts + 1, self.settings.launch.retries
        self.output.say(f"{member.task.name} {why}: starting it again ({restarts} of {retries})")
        self.usage += Usage(restarts=1)
        self._members[self._members.index(member)] = self._new_member(member.number, restarts)

    def _show_last_lines(self, log: Path) -> None:
        """Show the end of the log of a program that could not show it itself."""
        if not log.is_file():
            return
        lines = log.read_bytes().splitlines(keepends=True)[-_LAST_LINES:]
        self.output.say(f"the last lines of {log}:")
        self.output.write(b"".join(lines))

    def _count(self, member: Member) -> None:
        """Count the time that a task had its devices for."""
        if member.started is not None:
            gpus = member.task.program.gpus * self.settings.launch.gpus
            devices = member.task.program.processes * max(1, gpus)
            self.usage += Usage(device_seconds=devices * (time.monotonic() - member.started))

    def _say_waiting(self, left: list[Member]) -> None:
        now = time.monotonic()
        if any(member.started is not None for member in self._members):
            self._waiting_since = now
        elif left and now - self._waiting_since > _WAITING_SECONDS:
            self._waiting_since = now
            nodes, gpus = self.program.nodes, left[0].task.processes_per_node * self.program.gpus
            each = f" with {gpus} GPUs" if gpus and self.settings.launch.gpus else ""
            self.output.say(f"waiting for the cluster: {len(left)} tasks of {nodes} machine(s){each} each")

    def _end(self) -> None:
        """End the tasks that are still running or waiting, and wait for that; show their last words."""
        for member in self._unfinished():
            member.handle.cancel()
        deadline = time.monotonic() + _CANCEL_SECONDS
        while (left := self._unfinished()) and time.monotonic() < deadline and not self.settings.is_hurried():
            for member in left:
                member.is_done = member.handle.poll() is not None
                if member.is_done:
                    self._follow(member)
                    self._count(member)
            time.sleep(0.1 if self._unfinished() else 0.0)
        for member in self._unfinished():
            member.handle.kill()
            self._count(member)


def _endings(task: Task) -> dict[int, dict[str, Any]]:
    """Return what the machines of a task reported, once all have or some seconds have passed."""
    deadline = time.monotonic() + _FILE_SECONDS
    while len(found := task.endings()) < task.program.nodes and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
