"""Everything that must be seen on a GPU, in one run of at most nine minutes.

    python benchmarks/gpu_suite.py --out gpu.json
    python benchmarks/gpu_suite.py --tiny --parts kernels packing --out tiny.json    # tiny sizes on a CPU

Every part runs in a process of its own within its time, and the JSON file is written after each: its status (done, failed,
timed out, skipped, waiting), seconds, results, and the reason or error. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.process import GRACE_SECONDS, run_part
from spin.alignment.core.errors import InputError, lookup
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import Parser, interrupt_on_signals, run_program

BUDGET = 540.0


def make_parser() -> Parser:
    parser = Parser(prog="gpu_suite.py", description="All measurements that need a GPU, each within its time.")
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), help=f"any of {', '.join(PARTS)}, in the order to run them")
    add("--tiny", action="store_true", help="tiny sizes on a CPU, to test the parts")
    add("--budget", type=float, default=BUDGET, help="seconds of the whole run; a part that no longer fits is skipped")
    add("--out", required=True, help="JSON file to write")
    return parser


def check_options(options: Any) -> None:
    """Check every flag before a part starts.

    Raises:
        InputError: a part is unknown or named twice, the budget is not positive, or there is no GPU.
    """
    for name in options.parts:
        lookup(PARTS, name, "part")
    if len(set(options.parts)) < len(options.parts):
        raise InputError("parts names one twice: name each once")
    if not options.budget > 0:
        raise InputError(f"budget is {options.budget:g}: set it to a number of seconds above 0")
    if not options.tiny:
        import torch

        if not torch.cuda.is_available():
            raise InputError("PyTorch finds no GPU: run this on a machine with one, or set --tiny to test the parts")


def run_parts(options: Any, folder: Path) -> dict[str, Any]:
    """Run the parts one after the other, and write the JSON file after each; return what it contains."""
    ends = time.monotonic() + options.budget
    settings = {"tiny": options.tiny, "budget_seconds": options.budget}
    entries: dict[str, dict[str, Any]] = {name: {"status": "waiting"} for name in options.parts}
    result = {"settings": settings, "parts": entries}
    for name in options.parts:
        part = PARTS[name]
        reason = part.reason_to_skip(options.tiny)
        left = ends - time.monotonic() - GRACE_SECONDS
        if reason is None and left < part.seconds:
            reason = f"its {part.seconds:.0f} seconds do not fit in the {max(0.0, left):.0f} that are left"
        if reason:
            entry: dict[str, Any] = {"status": "skipped", "reason": reason}
        else:
            print(f"{name}: {part.summary} (at most {part.seconds:.0f} s)", flush=True)
            entry = run_part(name, part.seconds, options.tiny, folder / name)
        entries[name] = {"summary": part.summary, "budget_seconds": part.seconds, **entry}
        write_json_atomic(Path(options.out), result)
        print(f"{name}: {entry['status']} {entry.get('reason') or ''}{entry.get('error') or ''}", flush=True)
    return result


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    check_options(options)
    interrupt_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        result = run_parts(options, Path(folder))
    bad = [name for name, entry in result["parts"].items() if entry["status"] in ("failed", "timed out")]
    return 1 if bad else 0


if __name__ == "__main__":
    run_program(main)
