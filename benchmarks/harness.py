"""One process per contender; they wait on a pipe and take turns, so that only one of them runs at any time."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
# glibc keeps freed memory instead of returning it and faulting it in again for the next large tensor.
TUNED_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "200000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


class WorkerError(RuntimeError):
    """A worker ended before its turn was complete; the message is the end of its log."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know. The rows are read from ``rows_file``; turns end after the steps of ``turn_ends``.

    ``benchmark`` names the registry of the contender, ``weights`` the precision in which the model is loaded.
    """

    contender: str
    folder: str
    model: str
    model_folder: str
    rows_file: str
    device: str
    precision: str
    optimizer: str
    learning_rate: float
    beta: float
    batch_size: int
    max_length: int
    warmup_steps: int
    reps: int
    steps: int
    allocator: str
    threads: int
    benchmark: str = "pairs"
    weights: str = "float32"

    @property
    def turn_ends(self) -> list[int]:
        """The optimiser steps that end the warm-up and each measured turn."""
        return [self.warmup_steps + turn * self.steps for turn in range(self.reps + 1)]

    def rows(self) -> list[dict[str, list[int]]]:
        rows: list[dict[str, list[int]]] = json.loads(Path(self.rows_file).read_text(encoding="utf-8"))
        return rows


class Worker:
    """The parent's end: starts a process, gives it turns, reads what it measured."""

    def __init__(self, job: Job) -> None:
        """Start the process and wait until its model is loaded. ``facts`` is what it reports at that point."""
        self.name = job.contender
        folder = Path(job.folder)
        folder.mkdir(parents=True)
        self._log = folder / "log.txt"
        tuned = TUNED_ALLOCATOR if job.allocator == "tuned" else {}
        environment = {name: value for name, value in os.environ.items() if name not in TUNED_ALLOCATOR}
        environment |= {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env=environment | tuned,
            )
        self.facts = self._read()

    def turn(self) -> dict[str, Any]:
        """Let the worker run until its turn is complete; return what it measured.

        Raises:
            WorkerError: it ended instead.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._last_words()) from error
        return self._read()

    def close(self) -> None:
        """End the process, regardless of its state."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            return  # an unsent "go" for a worker that has exited

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(self._last_words())
        facts: dict[str, Any] = json.loads(line)
        return facts

    def _last_words(self) -> str:
        code = self._process.poll()
        how = "was killed, as happens when memory runs out" if code == -signal.SIGKILL else f"ended with code {code}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join([f"{self.name} {how}; the end of its log:", *lines[-15:]])


class Entry:
    """One contender's part in the benchmark: what it measured, or the error that ended it, so that the others continue."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.error: str | None = None
        self._worker: Worker | None = None

    def start(self) -> None:
        with self._surviving():
            self._worker = Worker(self.job)
            self.facts |= self._worker.facts

    def take_turn(self) -> None:
        with self._surviving():
            if self._worker:
                self.turns.append(self._worker.turn())

    def finish(self) -> None:
        """Fetch the final report of the worker."""
        with self._surviving():
            if self._worker:
                self.facts |= self._worker.turn()

    def close(self) -> None:
        if self._worker:
            self._worker.close()
            self._worker = None

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self.error = str(error)
            self.close()


class Turns:
    """The worker's end. Between two turns it holds no memory that the allocator could return."""

    def __init__(self, job: Job, orders: IO[str], answers: IO[str]) -> None:
        self.device = job.device
        self._orders, self._answers = orders, answers
        self._baseline: int | None = None
        self._started: tuple[float, float] | None = None
        self.records: list[dict[str, float]] = []

    def baseline(self) -> None:
        """Record the current memory as the baseline: libraries imported, the weights of one model loaded."""
        gc.collect()
        self._baseline = resident_bytes(self.device)

    def ready(self) -> None:
        """Tell the parent that preparation is complete."""
        self._send({"baseline_bytes": self._baseline})

    def begin(self) -> None:
        """Wait for the turn, then start the clocks: wall and processor time."""
        gc.collect()
        release_idle_memory(self.device)
        self._wait()
        self._started = (self._now(), time.process_time())

    def end(self, **facts: Any) -> None:
        """Stop the clocks and report their seconds, the peak so far, and ``facts``."""
        assert self._started is not None
        wall, cpu = self._started
        facts = {"wall_seconds": self._now() - wall, "processor_seconds": time.process_time() - cpu} | facts
        self._started = None
        self._send(facts | {"peak_bytes": peak_bytes(self.device)})

    def end_if_begun(self, **facts: Any) -> None:
        """Stop the clock and report if a turn is in progress."""
        if self._started is not None:
            self.end(**facts)

    def finish(self) -> None:
        """Wait for the last order and report the loss of every step."""
        self._wait()
        self._send({"records": self.records})

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _wait(self) -> None:
        if not self._orders.readline():
            raise SystemExit("the benchmark has ended")

    def _send(self, facts: dict[str, Any]) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()


def _status_bytes(field: str) -> int:
    """Return a field of /proc/self/status. Unlike getrusage's peak, it starts anew with each program."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident_bytes(device: str) -> int:
    """Return the memory currently in use: resident memory of the process, on a GPU that of its tensors."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Return the peak of memory in use: resident memory of the process, on a GPU that of its tensors."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def release_idle_memory(device: str) -> None:
    """Return memory that the allocator holds without using it to the system or the GPU."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)
