"""``spin run`` as a fork of a process that has imported everything, and its start server as a fork of that.

Each start of ``spin run`` costs about nine seconds of imports, most of them in its start server, which a storm of signals would
repeat hundreds of times. Everything else is as in a plain start: the sessions, the environment (also as the kernel shows it), the
output, and that the server is a child of ``spin run``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import traceback
import weakref
from pathlib import Path
from typing import NoReturn

import psutil

from spin.alignment.core.program import RUN_VARIABLE, run_program
from spin.alignment.pipeline import start_server
from spin.alignment.pipeline.start_programs import ProgramStarter
from tests.helpers import REPOSITORY

# Space for the mark of a run in the memory that /proc/PID/environ shows: in the environment of the process that forks.
RESERVED = {"SPIN_RESERVED_FOR_THE_MARK": "x" * 4000}


def fork_run(config: Path, said: Path) -> psutil.Process:
    """Start ``spin run CONFIG`` in a session of its own; its output goes to the file ``said``."""
    pid = os.fork()
    if pid == 0:
        _become_run(config, said)
    return psutil.Process(pid)


def _become_run(config: Path, said: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.chdir(REPOSITORY)
        _redirect(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
        # The tests may run as a shell's background job, whose children ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["spin", "run", str(config)]
        _fork_server()
        from spin.cli import main

        run_program(main, sys.argv[1:])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    start_server.leave(code)


def _redirect(output: int) -> None:
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)


def _fork_server() -> None:
    """Fork the start server now, while this process has one thread; it begins once ``spin run`` asks for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_server(theirs)
    theirs.close()

    def begin(starter: ProgramStarter) -> str | None:
        starter._control, starter.server_pid = ours, pid
        weakref.finalize(starter, ours.close)
        try:
            ours.send(json.dumps(starter.environment).encode())
            message = ours.recv(65536)
        except ConnectionError:
            message = b""
        if not message:
            return "the start server ended before it was ready"
        problem = json.loads(message)["problem"]
        return None if problem is None else str(problem)

    ProgramStarter._start_server = begin  # type: ignore[method-assign]


def _become_server(control: socket.socket) -> NoReturn:
    try:
        os.setsid()
        _redirect(os.open(os.devnull, os.O_WRONLY))
        environment = json.loads(control.recv(1 << 18) or "null")
        if environment is not None:  # otherwise ``spin run`` has ended without a program
            os.environ.clear()
            os.environ.update(environment)
            _show_mark(environment[RUN_VARIABLE])
            start_server.main(control)
    finally:
        os._exit(1)


def _show_mark(run_dir: str) -> None:
    """Write the mark of the run to where ``/proc/PID/environ`` reads it: ``spin run`` finds the rest of a killed run by it."""
    (name,) = RESERVED
    shown = Path("/proc/self/environ").read_bytes()
    place = shown.index(f"{name}={RESERVED[name]}\0".encode())
    mark = f"{RUN_VARIABLE}={run_dir}\0".encode()
    start = int(
        Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47]
    )  # env_start, field 50 of proc(5)'s stat
    ctypes.memmove(start + place, mark, len(mark))
