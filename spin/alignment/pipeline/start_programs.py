"""Starts programs: forked by the start server if it can serve them, otherwise as new processes. Both behave the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from spin.alignment.generation import BACKENDS, find_backend

PROGRAMS = Path(__file__).resolve().parents[2]
_NOT_SERVED = ("__init__", "__main__", "cli")  # `spin run` starts its own server
PLAIN_STARTS_VARIABLE = "SPIN_PLAIN_STARTS"
_READY_SECONDS = 300.0
_CLOSE_SECONDS = 5.0
# As in a plain start, the current folder is not on the module path.
_SERVER = (
    "import sys\n"
    "if not sys.flags.safe_path: del sys.path[0]\n"
    "import socket\n"
    "from spin.alignment.pipeline.start_server import main\n"
    "main(socket.socket(fileno=int(sys.argv[1])))"
)


class ServedProgram:
    """A program forked by the start server, with the part of the ``subprocess.Popen`` interface that callers use."""

    def __init__(self, pid: int, report: socket.socket) -> None:
        self.pid = pid
        self._report = report
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code if the program has ended, otherwise None."""
        try:
            return self.wait(timeout=0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code, negative for a signal.

        If the server has been killed, the exit code is unknown and the rest of the program is killed too.

        Raises:
            subprocess.TimeoutExpired: the program is still running after ``timeout`` seconds.
        """
        if self._code is None:
            self._report.settimeout(timeout)
            try:
                message = _receive(self._report)
            except (TimeoutError, BlockingIOError):  # of a timeout of 0
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            if message is None:
                kill_group(self.pid)
            self._code = -signal.SIGKILL if message is None else int(str(message["code"]))
            self._report.close()
        return self._code


def kill_group(leader: int) -> None:
    """Kill the remaining processes of a group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class ProgramStarter:
    """Starts programs in one environment, shared with the server. Safe to use from several threads.

    ``problem`` is the reason why programs are started as new processes, once there is one.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.problem: str | None = None
        if self.environment.get(PLAIN_STARTS_VARIABLE):
            self.problem = f"{PLAIN_STARTS_VARIABLE} is set"
        self.server_pid: int | None = None
        self._control: socket.socket | None = None
        self._mutex = threading.Lock()

    def prepare(self, command: Sequence[str], cwd: Path | None = None) -> None:
        """Wait for the server if it serves this command; the first call starts it."""
        if not is_served(command, cwd or Path.cwd()):
            return
        with self._mutex:
            if self.problem is None and self._control is None:
                self.problem = self._start_server()

    def start(
        self, command: Sequence[str], stdout: int, stderr: int, cwd: Path | None = None
    ) -> ServedProgram | subprocess.Popen[bytes]:
        """Start a command as the leader of its own session, without standard input."""
        folder = cwd or Path.cwd()
        self.prepare(command, folder)
        served = self._ask(command[1:], folder, stdout, stderr) if is_served(command, folder) else None
        if served is not None:
            return served
        return subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            cwd=folder,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the server, once its programs have ended. Later starts are new processes."""
        self.problem = self.problem or "the server was closed"
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):  # it has already ended
                control.shutdown(socket.SHUT_RDWR)

    def _start_server(self) -> str | None:
        """Start the server and wait until it is ready; return why it cannot serve, or None if it can."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                server = subprocess.Popen(
                    [sys.executable, "-c", _SERVER, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=self.environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            return f"the start server did not start: {error}"
        self._control, self.server_pid = ours, server.pid
        weakref.finalize(self, _end_server, ours, server)
        ours.settimeout(_READY_SECONDS)
        try:
            message = _receive(ours)
        except TimeoutError:
            return f"the start server was not ready after {_READY_SECONDS:g} s"
        ours.settimeout(None)
        if message is None:
            return "the start server ended before it was ready"
        return None if message["problem"] is None else str(message["problem"])

    def _ask(self, arguments: Sequence[str], cwd: Path, stdout: int, stderr: int) -> ServedProgram | None:
        """Let the server start a program; return None if it cannot, and do not ask it again."""
        if self.problem is not None or self._control is None:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd)}).encode()
        try:
            with theirs:
                socket.send_fds(self._control, [request], [theirs.fileno(), stdout, stderr])
            message = _receive(ours)
        except OSError as error:
            message, self.problem = None, f"the start server does not answer: {error}"
        if message is None or "pid" not in message:
            self.problem = self.problem or "the start server could not start a program"
            ours.close()
            return None
        return ServedProgram(int(str(message["pid"])), ours)


def _end_server(control: socket.socket, server: subprocess.Popen[bytes]) -> None:
    control.close()
    try:
        server.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _receive(connection: socket.socket) -> dict[str, object] | None:
    """Return the next message; None if the other end has closed."""
    try:
        message = connection.recv(65536)
    except ConnectionError:
        return None
    return json.loads(message) if message else None


def is_served(command: Sequence[str], cwd: Path) -> bool:
    """Return whether a command is ``python PROGRAM arguments`` with a program of this package that runs in one process.

    Backends that start their own processes are not served: they must be the first to configure torch.
    """
    if len(command) < 2 or command[0] != sys.executable or not command[1].endswith(".py"):
        return False
    program = (cwd / command[1]).resolve()
    is_program = program.parent == PROGRAMS and program.stem not in _NOT_SERVED and program.is_file()
    return is_program and not _makes_processes(command[2:], cwd)


def _makes_processes(arguments: Sequence[str], cwd: Path) -> bool:
    """Return whether arguments, or the configuration they begin with, name a backend that makes processes of its own."""
    names = [name for name in BACKENDS if find_backend(name).makes_processes]
    if any(word in names or word.partition("=")[2] in names for word in arguments):
        return True
    configs = [cwd / word for word in arguments[:1] if word.endswith((".yaml", ".yml"))]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in configs if path.is_file()]
    return any(f"backend: {name}" in text for name in names for text in texts)
