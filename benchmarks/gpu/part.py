"""What a part of the GPU suite is, and what it is given: the device, and a file for what it finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from spin.alignment.core.files import write_json_atomic


@dataclass
class Findings:
    """The results of one part. Every addition is written at once, so that a part which is killed leaves what it had measured.

    ``failed`` are the names of results that are errors or are not as they must be: the part then counts as failed.
    """

    file: Path
    tiny: bool
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """``cpu`` at tiny sizes, otherwise ``cuda``."""
        return "cpu" if self.tiny else "cuda"

    def add(self, name: str, value: Any) -> None:
        """Record a result: anything that JSON can represent."""
        self.facts[name] = value
        write_json_atomic(self.file, self.facts)

    def attempt(self, name: str, measure: Callable[[], Any]) -> None:
        """Record the result of ``measure``, or its error, so that the next measurement of the part follows."""
        try:
            self.add(name, measure())
        except Exception as error:  # a kernel that fails to compile, memory that runs out: all are results here
            self.failed.append(name)
            self.add(name, {"error": f"{type(error).__name__}: {error}"})


@dataclass(frozen=True)
class Part:
    """``run`` measures and records; it is killed after ``seconds``. ``needs`` are the packages that it imports."""

    summary: str
    seconds: float
    run: Callable[[Findings], None]
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False

    def reason_to_skip(self, tiny: bool) -> str | None:
        """Return why the part cannot run here, or None."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        return "it needs a GPU" if self.needs_gpu and tiny else None


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` takes, including everything that it started on the GPU, and its result."""
    synchronize(device)
    started = perf_counter()
    result = work()
    synchronize(device)
    return perf_counter() - started, result


def median_seconds(device: str, work: Callable[[], Any], repetitions: int) -> float:
    """Return the median seconds of ``work``, after one run that is not counted (compilation, allocation)."""
    work()
    return median(timed(device, work)[0] for _ in range(repetitions))


def synchronize(device: str) -> None:
    """Wait until the GPU has finished."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def start_of_peak(device: str) -> None:
    """Free unused memory and let the peak of the GPU's tensors start from what is in use now."""
    import gc

    from benchmarks.harness import release_idle_memory

    gc.collect()
    release_idle_memory(device)
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
