"""The registry of the suite's parts, in the order in which they run: what is most wanted, and what is quick, comes first."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from benchmarks.gpu.part import Findings, Part

TRAINING = ("datasets", "accelerate")  # what the Trainers import


def _late(module: str, name: str, *arguments: object) -> Callable[[Findings], None]:
    """Return a part that is imported when it runs, so that an import that fails ends that part only.

    With ``arguments``, the name is that of a function which returns the part.
    """

    def run(findings: Findings) -> None:
        found = getattr(import_module(f"benchmarks.gpu.{module}"), name)
        (found(*arguments) if arguments else found)(findings)

    return run


def _finetuning(shape: str, model: str, seconds: float) -> Part:
    is_large = model == "7b"
    contenders = ("ours",) if is_large else ("ours", "trl_best_grouped", "trl_best")
    flags = ("--weights", "bfloat16", "--optimizer", "rmsprop", "--precision", "bf16") if is_large else ()
    against = "alone, RMSprop, bfloat16 weights" if is_large else "against TRL's best settings"
    run = _late("finetuning", "finetuning", shape, model, contenders, *flags)
    return Part(f"finetune.py at {model}, {shape}: ours {against}", seconds, run, TRAINING)


PARTS = {
    "machine": Part("machine and versions", 60, _late("machine", "describe_machine")),
    "packing": Part("packed and padded log-probs in bfloat16", 60, _late("packing", "measure_packing")),
    "kernels": Part("attention kernels against naive attention", 120, _late("kernels", "measure_kernels")),
    "large_steps": Part("steps of a 7B model with RMSprop", 90, _late("steps", "measure_large_steps"), ("accelerate",)),
    "memory": Part("estimated and measured memory of steps", 60, _late("steps", "measure_memory"), ("accelerate",)),
    "finetune_uc_0.5b": _finetuning("uc", "0.5b", 120),
    "finetune_lp_0.5b": _finetuning("lp", "0.5b", 120),
    "finetune_uc_7b": _finetuning("uc", "7b", 120),
    "finetune_uc_1.5b": _finetuning("uc", "1.5b", 130),
    "finetune_lp_1.5b": _finetuning("lp", "1.5b", 130),
    "finetune_lp_7b": _finetuning("lp", "7b", 120),
    "online": Part(
        "online step beside an engine", 150, _late("engines", "measure_online_step"), ("vllm", "accelerate")
    ),
    "generation": Part("our generation and the bare engine", 240, _late("engines", "measure_generation"), ("vllm",)),
    "sleep": Part("memory of a sleeping engine", 90, _late("engines", "measure_sleep"), ("vllm",), needs_gpu=True),
}
