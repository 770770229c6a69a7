"""The machine that a run uses: processor, cores, memory, GPUs and the Python version; and the peak memory of a process."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def host_key() -> str:
    """Return what identifies the machine, boot and process namespace within which a process id is unique."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        parts.append("unknown")
    return "/".join(parts)


def start_of(pid: int) -> str | None:
    """Return when a process of this machine started, in clock ticks since boot; None if it does not exist, or without /proc."""
    try:
        # Field 22 of proc(5)'s stat, counted from after the command name, which may itself contain spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def process_record() -> dict[str, str | int | None]:
    """Return what a file says of the process that writes it, for :func:`has_ended`."""
    return {"host": host_key(), "pid": os.getpid(), "start": start_of(os.getpid())}


def has_ended(record: Mapping[str, Any]) -> bool:
    """Return whether the process of a :func:`process_record` is known to have ended: it was one of this machine."""
    if record.get("host") != host_key() or not Path("/proc/self/stat").exists():
        return False
    # A process id may have been reused; together with its start time it identifies one process.
    return start_of(int(record["pid"])) != record.get("start")


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


def size_text(number: float) -> str:
    """Return bytes as text: ``-`` for none, else in MiB or GiB."""
    if not number:
        return "-"
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"


def weights_text(count: float) -> str:
    """Return a number of weights as text, in billions, millions or thousands: ``7.24B weights``."""
    unit, scale = next((item for item in (("B", 1e9), ("M", 1e6)) if count >= item[1]), ("k", 1e3))
    return f"{count / scale:.3g}{unit} weights"
