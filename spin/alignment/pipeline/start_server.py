"""The start server of a run: a process that has imported the heavy libraries and forks the programs that need them.

Importing torch, transformers and the Trainer takes about eight seconds of processor time. Here that happens once: each
program is a fork of this process, which does nothing else. A fork is safe because this process has one thread, has never touched
a GPU and has run no code of any program; if one of these is not true, the server reports it and ends, and programs are started as
new processes.

Protocol (``SOCK_SEQPACKET``, JSON): the server first sends ``{"problem": null}`` or why it cannot serve. Each request is
``{"arguments": [program, ...], "cwd": folder}`` with three descriptors: a socket for reports on this program, its standard
output and its standard error. On the program's socket come ``{"pid": N}`` once it leads its own session, and
``{"code": N}`` when it has ended (negative: the signal). When the client's end closes, the server ends, and the kernel
sends SIGTERM to the programs of a run (see ``follow_run``).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

MAX_REQUEST_BYTES = 1 << 20
# Modules that any program may need. None of them starts a thread that outlives a fork, touches a GPU or draws a random number.
LIBRARIES = (
    "numpy",
    "torch",
    "pyarrow.compute",
    "pyarrow.parquet",
    "datasets",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "spin.alignment.data.encode_pairs",
    "spin.alignment.evaluation.evaluate",
    "spin.alignment.evaluation.held_out",
    "spin.alignment.generation.transformers.backend",
    "spin.alignment.generation.worker",
    "spin.alignment.pairs.annotate",
    "spin.alignment.pairs.convert",
    "spin.alignment.token_weights.estimate",
)
# Only on machines without a GPU: the Trainer imports peft and with it bitsandbytes, which initialises CUDA.
TRAINING_LIBRARIES = (
    "spin.alignment.training.preference",
    "spin.alignment.training.sft",
    "spin.alignment.training.online.run",
)
# Imported by accelerate at the first step of a training, where they are installed.
LIBRARIES_AT_FIRST_USE = ("deepspeed",)
# Read by libraries on import: torch detects GPUs without initialising CUDA, and pyarrow's spare allocator starts no thread.
_WHILE_IMPORTING = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


@dataclass
class Request:
    """A program to start: its arguments, its folder, and where its output and the reports about it go."""

    arguments: list[str]
    cwd: str
    report: socket.socket
    stdout: int
    stderr: int

    def close(self) -> None:
        self.report.close()
        os.close(self.stdout)
        os.close(self.stderr)


def import_libraries() -> bool:
    """Import what programs need; return whether there is a GPU.

    Changes that libraries make to the environment are reverted: programs get it unchanged.
    """
    given = dict(os.environ)
    os.environ.update({**_WHILE_IMPORTING, **given})
    try:
        for name in LIBRARIES:
            importlib.import_module(name)
        import torch

        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            import_training_libraries()
        return has_gpu
    finally:
        os.environ.clear()
        os.environ.update(given)


def import_training_libraries() -> None:
    """Import what training needs, and what it would import or compute at its first step."""
    for name in TRAINING_LIBRARIES:
        importlib.import_module(name)
    for name in LIBRARIES_AT_FIRST_USE:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    build_conversion_table()


def build_conversion_table() -> None:
    """Let transformers build its table of renamed weights, which it keeps and would build when the first model is loaded."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def fork_problem(has_gpu: bool) -> str | None:
    """Return why a fork of this process is not equivalent to a new process; None if it is.

    The trial fork also ends the idle threads of OpenBLAS, which shuts them down before every fork. Without a GPU, torch's CUDA
    build has asked the CUDA runtime for one, after which forks may not use CUDA: nothing is lost, as they could not anyway.
    """
    import torch

    if torch.cuda.is_initialized():
        return "importing the libraries initialised CUDA"
    trial = os.fork()
    if trial == 0:
        os._exit(has_gpu and bool(torch.cuda._is_in_bad_fork()))
    if os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1]):
        return "importing the libraries touched CUDA"
    try:
        threads = len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return "the threads of a process cannot be counted here"
    return None if threads == 1 else f"importing the libraries left {threads} threads"


class StartServer:
    """Forks programs on request and reports how they ended, in one thread."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.reports: dict[int, socket.socket] = {}
        self._previous_handler = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._wakeup, wakeup_write = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_write.setblocking(False)
        self._wakeup_write = wakeup_write
        signal.set_wakeup_fd(wakeup_write.fileno())

    def serve(self) -> Request | None:
        """Serve until the client's end closes, then return None. In each forked process, return its request immediately."""
        while True:
            readable, _, _ = select.select([self.control, self._wakeup], [], [])
            if self._wakeup in readable:
                self._wakeup.recv(4096)
                self._report_ended()
            if self.control in readable:
                request = self._receive()
                if request is None:
                    self._report_ended()
                    return None
                if self._fork(request) == 0:
                    self._leave()
                    return request

    def _receive(self) -> Request | None:
        message, descriptors, _, _ = socket.recv_fds(self.control, MAX_REQUEST_BYTES, 3)
        if not message:
            return None
        report, stdout, stderr = descriptors
        return Request(**json.loads(message), report=socket.socket(fileno=report), stdout=stdout, stderr=stderr)

    def _fork(self, request: Request) -> int:
        """Return the number of the new process, 0 in it, and -1 if the fork failed (then no report is sent)."""
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid > 0:
            self.reports[pid] = request.report.dup()
        if pid != 0:
            request.close()
        return pid

    def _report_ended(self) -> None:
        while self.reports:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self.reports.pop(pid) as report:
                _send(report, {"code": os.waitstatus_to_exitcode(status)})

    def _leave(self) -> None:
        """In a forked process: close everything that belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self._previous_handler)
        for held in (self.control, self._wakeup, self._wakeup_write, *self.reports.values()):
            held.close()
        self.reports.clear()


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # the client no longer listens
        connection.send(json.dumps(message).encode())


def become_program(request: Request) -> str:
    """Turn this forked process into what ``python program arguments`` would have started; return the program's path.

    Its session, folder, output, arguments, module path and random states are its own (``random`` reseeds itself after a fork).
    """
    import numpy
    import torch

    os.setsid()
    os.chdir(request.cwd)
    os.dup2(request.stdout, 1)
    os.dup2(request.stderr, 2)
    program = request.arguments[0]
    sys.argv = list(request.arguments)
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path(program).resolve().parent))
    numpy.random.seed()
    torch.default_generator.seed()
    with contextlib.suppress(OSError):  # the name shown by `top`
        Path("/proc/self/comm").write_text(Path(program).stem, encoding="utf-8")
    _send(request.report, {"pid": os.getpid()})
    request.close()
    return program


def run_program_file(program: str) -> int:
    """Run a program as ``__main__``; return its exit code as the interpreter would choose it (-SIGINT for an interrupt)."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(code: int) -> NoReturn:
    """End this forked process like the interpreter, but without freeing every object, which alone takes a second or two.

    Threads are joined, exit handlers run, output is flushed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            code = code or 120  # the interpreter's own code for output that could not be written
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def main(control: socket.socket) -> None:
    """Serve the client at the other end; in a forked process, run the program and exit."""
    problem = fork_problem(has_gpu=import_libraries())
    _send(control, {"problem": problem})
    if problem is not None:
        return
    gc.collect()
    gc.freeze()  # a collection in a program would write to, and so copy, every page shared with the server
    request = StartServer(control).serve()
    if request is None:
        os._exit(0)
    leave(run_program_file(become_program(request)))
