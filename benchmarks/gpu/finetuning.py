"""Runs of ``benchmarks/finetune.py``: this project against TRL's best settings at 0.5B and 1.5B, and alone at 7B."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import finetune
from benchmarks.gpu.part import Findings
from spin.alignment.core.files import read_json

TINY = ("--model", "tiny", "--batch_size", "2", "--reps", "1", "--precision", "fp32", "--allocator", "stock")


def finetuning(shape: str, model: str, contenders: tuple[str, ...], *flags: str) -> Callable[[Findings], None]:
    """Return the part that compares contenders at a shape and a size of the model; ``flags`` are those of ``finetune.py``."""

    def run(findings: Findings) -> None:
        known = importlib.util.find_spec("trl") is not None
        names = [name for name in contenders if known or not name.startswith("trl")]
        if len(names) < len(contenders):
            findings.add("left_out", "TRL's contenders: trl is not installed")
        # One after the other: a waiting contender would keep its weights on the GPU.
        sizes = TINY if findings.tiny else ("--model", model, "--steps", "4", "--schedule", "sequential", *flags)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            common = ["--shape", shape, "--device", findings.device, "--out", str(out), "--contenders", *names]
            code = finetune.main([*common, *sizes])
            for name, value in read_json(out).items():
                findings.add(name, value)
        if code:
            raise RuntimeError("the contenders do not compare: see verification and contenders")

    return run
