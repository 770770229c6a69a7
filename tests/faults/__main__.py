"""The long form of the fault suite: ``python -m tests.faults [--only PART ...]``.

Everything that ``pytest tests/faults`` samples, at every file operation, with 200 signals and 64 writers. The results are written
as they come, part by part: what an earlier command has done is not done again, also after an interruption.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin.alignment.core.files import write_json_atomic
from tests.faults.plan import LONG
from tests.helpers import REPOSITORY, program_environment

PARTS = {part: module for module, parts in LONG.items() for part in parts}
# What counts as one of the planned faults of a part.
FAULTS = ("kill", "full", "small disk", "bit flip")


def reports(module: str, parts: dict[str, Any], root: Path, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that a module of this package prints for some parts of a plan, as they come."""
    from tests.faults.forked_run import RESERVED
    from tests.faults.forks import ENVIRONMENT

    settings = json.dumps({"parts": parts, "root": str(root), "seed": seed})
    environment = program_environment(PYTHONPATH=str(REPOSITORY), **ENVIRONMENT, **RESERVED)
    command = [sys.executable, "-m", f"tests.faults.{module}", settings]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"tests.faults.{module} ended with exit code {process.returncode}")


def number_of_faults(report: dict[str, Any]) -> int:
    """Return how many of the planned faults a report is about."""
    return int(report.get("count", 1)) if report["how"] in FAULTS or " to " in report["how"] else 0


def note(result: dict[str, Any], report: dict[str, Any]) -> None:
    """Add a report to the result of its part."""
    result["planned"] = report.get("planned", result.get("planned"))
    result["done"] += number_of_faults(report)
    counts = result["counts"]
    if report["how"] == "file operations":  # of one undisturbed run, however often the part was interrupted
        counts["file operations"] = report["count"]
    else:
        counts[report["how"]] = counts.get(report["how"], 0) + report.get("count", 1)
    if report.get("refused"):
        counts["damaged file refused by name"] = counts.get("damaged file refused by name", 0) + 1
    if report["wrong"]:
        result["failures"].append(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "faults.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="forget the earlier results of these parts")
    arguments = parser.parse_args()
    earlier = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    found = earlier.get("parts", {}) if earlier.get("seed") == arguments.seed else {}
    for part, module in PARTS.items():
        if part not in arguments.only:
            continue
        if part not in found or arguments.again:
            found[part] = {"done": 0, "counts": {}, "failures": []}
        result = found[part]
        if result["done"] >= result.get("planned", 1):
            continue
        plan = {part: {**LONG[module][part], "done": result["done"]}}
        with tempfile.TemporaryDirectory() as root:
            for report in reports(module, plan, Path(root), arguments.seed):
                note(result, report)
                ordered = {name: found[name] for name in PARTS if name in found}
                write_json_atomic(arguments.output, {"seed": arguments.seed, "parts": ordered})
        print(f"{part}: {result['done']} faults, {len(result['failures'])} failures", flush=True)
    return 1 if any(found[part]["failures"] for part in arguments.only) else 0


if __name__ == "__main__":
    sys.exit(main())
