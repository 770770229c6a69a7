"""Child programs of a run: started in their own process group, shown and logged line by line, ended together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from spin.alignment.core.console import MARK_VARIABLE
from spin.alignment.core.program import RUN_VARIABLE
from spin.alignment.pipeline.stage_output import StageOutput
from spin.alignment.pipeline.stalls import StallWatch, culprits, examine, process_state
from spin.alignment.pipeline.start_programs import PROGRAMS, ProgramStarter, ServedProgram

_CHUNK_BYTES = 65536
_LOOK_SECONDS = 1.0
_STRAGGLER_SECONDS = 5.0
_TERMINATION_SECONDS = 20.0
PipeId = tuple[int, int]


class ProgramEnded(Exception):
    """A program ended without an exit code that says why; the message does."""


class ProgramStalled(ProgramEnded):
    """A program made no progress for too long and was ended; the message says what its processes were doing."""


def log_path(run_dir: Path, stage: str) -> Path:
    """Return the log of a stage, or of one of its tasks."""
    return run_dir / "logs" / f"{stage.replace('/', '-')}.log"


class ChildPrograms:
    """Starts programs for a run directory and keeps track of those that are running. Safe to use from several threads."""

    def __init__(
        self,
        run_dir: Path,
        one_thread: bool,
        prefix: bool,
        stall_timeout: float = 0.0,
        secrets: Mapping[str, str] | None = None,
        look: Callable[[str, str], None] = lambda stage, activity: None,
    ) -> None:
        """Prepare to start programs; none is started yet.

        Args:
            one_thread: give each child one OpenMP thread.
            prefix: start each line with the stage that it came from.
            stall_timeout: seconds without output or a changed file after which a program is ended; 0: never.
            secrets: what the programs get in their environment and no file may contain.
            look: called about once a second while a program runs, with its stage and what it does.
        """
        self.run_dir, self.prefix, self.stall_timeout, self.look = run_dir, prefix, stall_timeout, look
        marked = {RUN_VARIABLE: str(run_dir.resolve()), MARK_VARIABLE: "1", "PYTHONUNBUFFERED": "1"}
        self.environment = {**os.environ, **(secrets or {}), **marked}
        if one_thread:
            self.environment["OMP_NUM_THREADS"] = "1"
        self.starter = ProgramStarter(self.environment)
        self.is_hurried: Callable[[], bool] = lambda: False
        self._living: dict[int, PipeId] = {}  # of each program's output
        self._mutex = threading.Lock()
        self._stopped = False

    def log_path(self, stage: str) -> Path:
        return log_path(self.run_dir, stage)

    def run(self, stage: str, command: Sequence[str], folder: Path | None = None) -> int:
        """Run one command and wait for it; ``folder`` is where its files change.

        Returns:
            Its exit code, negative for a signal; 130 if it was interrupted, 2 if its log names bad input.

        Raises:
            ProgramStalled: it made no progress for ``stall_timeout`` seconds, and was ended.
        """
        # Only this project's own programs mark what they say.
        is_own = any(Path(word).parent == PROGRAMS for word in command)
        output = StageOutput(self.log_path(stage), f"[{stage}] " if self.prefix else "", only_marked=is_own)
        with output:
            output.log(("$ " + " ".join(command) + "\n").encode(errors="backslashreplace"))
            self.starter.prepare(command)  # may take seconds, and stop() must not wait for it
            with self._mutex:
                if self._stopped:  # stop() was called while the server started: nothing may start after it
                    return 130
                child, pipe = self._start(command)
                pipe_id = identity(pipe)
                self._living[child.pid] = pipe_id
            try:
                with pipe:
                    self._follow(child, pipe, output, StallWatch(self.stall_timeout, folder), stage)
                code = child.wait()
            except BaseException:
                end_processes(members(child.pid, pipe_id), self.is_hurried)
                child.wait()
                raise
            finally:
                with self._mutex:
                    self._living.pop(child.pid, None)
        if code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, 130):
            return 130
        # accelerate returns 1 for any failure of its children, so an error line in the log means bad input.
        code = 2 if code == 1 and output.named_bad_input else code
        if code not in (0, 2):
            output.show_last_lines()
        return code

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes] | ServedProgram, BinaryIO]:
        """Start a command; return it and the read end of the pipe for both of its outputs."""
        read_end, write_end = os.pipe()
        output = os.fdopen(read_end, "rb", buffering=0)
        try:
            return self.starter.start(command, stdout=write_end, stderr=write_end), output
        except BaseException:
            output.close()
            raise
        finally:
            os.close(write_end)

    def _follow(
        self,
        child: subprocess.Popen[bytes] | ServedProgram,
        pipe: BinaryIO,
        output: StageOutput,
        watch: StallWatch,
        stage: str,
    ) -> None:
        """Show and log the output until the program and everything that it started have ended."""
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        ended_at: float | None = None
        while True:
            if poll.poll(_LOOK_SECONDS * 1000):
                chunk = os.read(pipe.fileno(), _CHUNK_BYTES)
                if not chunk:
                    break
                output.write(chunk)
                watch.note_output()
            self.look(stage, output.activity)
            if ended_at is None and child.poll() is not None:
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > _STRAGGLER_SECONDS:
                # A launcher that was killed leaves its workers, which hold the pipe and wait for each other forever.
                stragglers = [pid for pid in members(child.pid, identity(pipe)) if pid != child.pid]
                output.say(f"the program has ended, but {len(stragglers)} of its processes have not: ending them")
                end_processes(stragglers, self.is_hurried)
                break
            if ended_at is None and watch.is_stalled():
                self._end_stalled(child.pid, pipe, output)
        output.finish()

    def _end_stalled(self, leader: int, pipe: BinaryIO, output: StageOutput) -> None:
        processes = examine(members(leader, identity(pipe)), pipe)
        last = output.last_line
        for item in processes:
            output.log(f"stack of {item.name}:\n{item.stack}\n".encode() if item.stack else b"")
        doing = "; ".join(item.description for item in culprits(processes)[:4])
        raise ProgramStalled(
            f"no output and no changed file for {self.stall_timeout:g} s (launch.stall_timeout): {doing or 'no process answers'}"
            f"; its last line: {last or '(none)'}"
        )

    def stop(self) -> None:
        """End every running child and its process group: SIGTERM first, SIGKILL after 20 seconds. Nothing starts after this."""
        with self._mutex:
            self._stopped = True
            living = dict(self._living)
        groups = [pid for leader, pipe in living.items() for pid in members(leader, pipe)]
        end_processes(groups, self.is_hurried)
        self.starter.close()  # only now: the server has to report how its programs ended


def identity(pipe: BinaryIO) -> PipeId:
    """Return what both ends of a pipe, and all their copies, have in common."""
    facts = os.fstat(pipe.fileno())
    return facts.st_dev, facts.st_ino


def members(leader: int, pipe: PipeId) -> list[int]:
    """Return the processes of a program: those in the group of its leader, and those that hold the pipe of its output.

    The workers of a launcher have groups of their own.
    """
    group = group_members(leader)
    return [*group, *(pid for pid in pipe_holders(pipe) if pid not in group)]


def pipe_holders(pipe: PipeId) -> list[int]:
    """Return the other processes of this user that write to a pipe (none if there is no /proc)."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/[12]"):
        try:
            facts = link.stat()
            if (facts.st_dev, facts.st_ino) == pipe:
                found.add(int(link.parent.parent.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return sorted(found - {os.getpid()})


def group_members(leader: int) -> list[int]:
    """Return the processes in the group of a leader (only the leader if there is no /proc)."""
    members = [leader]
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and int(entry.parent.name) != leader:
            members.append(int(entry.parent.name))
    return members


def python_command(program: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command of a program in one plain process."""
    return [sys.executable, str(program), *arguments]


def launcher_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of accelerate launch with its arguments, as the programs of a run are started with it."""
    return [sys.executable, "-m", "spin.alignment.pipeline.launch", *arguments]


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


def end_processes(pids: list[int], is_hurried: Callable[[], bool] = lambda: False) -> None:
    """Send SIGTERM to processes, and SIGKILL to those that have not ended after 20 seconds, or once ``is_hurried()``."""
    _signal_all(pids, signal.SIGTERM)
    deadline = time.monotonic() + _TERMINATION_SECONDS
    while (pids := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < deadline and not is_hurried():
        time.sleep(0.1)
    _signal_all(pids, signal.SIGKILL)


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _is_alive(pid: int) -> bool:
    # A zombie has ended, its parent has only not collected it yet.
    return process_state(pid) not in ("", "Z")
