"""Child programs of a run: started in their own process group, shown and logged line by line, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from spin.alignment.pipeline.start_programs import ProgramStarter, ServedProgram

_CHUNK_BYTES = 65536


class ChildPrograms:
    """Starts programs for a run directory and keeps track of those that live. Safe to use from several threads."""

    def __init__(self, run_dir: Path, one_thread: bool, prefix: bool) -> None:
        """``one_thread`` gives each child one OpenMP thread; ``prefix`` marks each line with the stage it came from."""
        self.run_dir, self.prefix = run_dir, prefix
        self.environment = {**os.environ, RUN_VARIABLE: str(run_dir.resolve()), "PYTHONUNBUFFERED": "1"}
        if one_thread:
            self.environment["OMP_NUM_THREADS"] = "1"
        self.starter = ProgramStarter(self.environment)
        self._living: dict[int, subprocess.Popen[bytes] | ServedProgram] = {}
        self._mutex = threading.Lock()
        self._stopped = False

    def log_path(self, stage: str) -> Path:
        return self.run_dir / "logs" / f"{stage.replace('/', '-')}.log"

    def run(self, stage: str, command: Sequence[str]) -> int:
        """Run one command to its end; return its exit code (130 when it was stopped by a signal)."""
        log_path = self.log_path(stage)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            start = log.tell()
            log.write(("$ " + " ".join(command) + "\n").encode())
            self.starter.prepare(command)  # may take seconds, in which stop() must not have to wait
            with self._mutex:
                if self._stopped:
                    return 130
                child, output = self._start(command)
                self._living[child.pid] = child
            try:
                with output:
                    self._show(stage, output, log)
                code = child.wait()
            except BaseException:
                end_processes(group_members(child.pid))
                child.wait()
                raise
            finally:
                with self._mutex:
                    self._living.pop(child.pid, None)
        return self._exit_code(code, log_path, start)

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes] | ServedProgram, BinaryIO]:
        """Start a command; return it and the end of the pipe that both its outputs go to."""
        read_end, write_end = os.pipe()
        output = os.fdopen(read_end, "rb", buffering=0)
        try:
            return self.starter.start(command, stdout=write_end, stderr=write_end), output
        except BaseException:
            output.close()
            raise
        finally:
            os.close(write_end)

    def _show(self, stage: str, output: BinaryIO, log: BinaryIO) -> None:
        """Copy the output to the log and the terminal. Progress bars (carriage returns) reach a terminal only."""
        mark = f"[{stage}] ".encode() if self.prefix else b""
        pending = b""
        while chunk := os.read(output.fileno(), _CHUNK_BYTES):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._tell(mark, line.rstrip(b"\r").rpartition(b"\r")[2], log)
            if b"\r" in pending and sys.stdout.isatty() and not self.prefix:
                sys.stdout.buffer.write(b"\r" + pending.rpartition(b"\r")[2])
                sys.stdout.flush()
        if pending:
            self._tell(mark, pending, log)

    @staticmethod
    def _tell(mark: bytes, line: bytes, log: BinaryIO) -> None:
        log.write(line + b"\n")
        log.flush()
        text = (mark + line).decode(errors="replace")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    @staticmethod
    def _exit_code(code: int, log_path: Path, start: int) -> int:
        """Map to 0, 1, 2 or 130; accelerate reports 1 whatever its children said, so their sentence decides."""
        if code in (-signal.SIGINT, -signal.SIGTERM, 130):
            return 130
        if code in (0, 2):
            return code
        with log_path.open("rb") as log:
            log.seek(start)
            said = log.read().splitlines()
        bad_input = any(line.startswith((b"error: ", b"[rank0]:error: ")) for line in said)
        return 2 if bad_input else 1

    def stop(self) -> None:
        """End every living child and its process group: ask first, kill after 20 seconds. Nothing is started after this."""
        with self._mutex:
            self._stopped = True
            living = list(self._living)
        groups = [pid for leader in living for pid in group_members(leader)]
        end_processes(groups)
        self.starter.close()  # it reports how they ended first


def group_members(leader: int) -> list[int]:
    """Return the processes in the group of a leader (the leader alone where /proc is absent)."""
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


def accelerate_command(
    program: Path, arguments: Sequence[str], num_processes: int, config_file: str | None
) -> list[str]:
    """Return the command of a program in ``num_processes`` processes (plain Python for one without ``config_file``)."""
    if num_processes == 1 and config_file is None:
        return python_command(program, arguments)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={num_processes}"]
    if config_file is not None:
        launcher.append(f"--config_file={config_file}")
    else:
        # --multi_gpu is accelerate's word for "start N processes here"; without GPUs they run on the CPU.
        launcher += ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        launcher.append("--main_process_port=0")
    return [*launcher, str(program), *arguments]


RUN_VARIABLE = "SPIN_RUN_DIRECTORY"
_TERMINATION_SECONDS = 20.0


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
