"""The machine that a run uses: processor, cores, memory, GPUs and the Python version; and the peak memory of a process."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

GIB = 2**30


def describe_machine() -> dict[str, str]:
    """Return the processor, cores, memory, GPUs, operating system and Python version as texts, without importing torch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "GPUs": _gpus(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process in GiB: of the host, and of its GPU if torch has used one."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}  # Linux counts in KiB
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_reserved() / GIB
    return {name: round(value, 2) for name, value in peak.items()}


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> str:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "none"
    names = [line.strip() for line in listed.splitlines() if line.strip()]
    return "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
