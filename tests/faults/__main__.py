"""The long form of the fault suite: python -m tests.faults [--output benchmarks/results/faults.json].

Everything that ``pytest tests/faults`` samples, at every operation and with 200 signals. Takes about an hour on two idle
cores. The results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.plan import LONG
from tests.helpers import REPOSITORY, program_environment


def reports(module: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that a module of this package prints, as they come."""
    command = [sys.executable, "-m", f"tests.faults.{module}", json.dumps(settings)]
    environment = program_environment(PYTHONPATH=str(REPOSITORY))
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"tests.faults.{module} ended with exit code {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "faults.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one program, or one kind of run; the results of the others are kept")
    parser.add_argument("--signals", type=int, help="signals for each kind of run, instead of those of the plan")
    arguments = parser.parse_args()
    programs = {name: counts for name, counts in LONG["programs"].items() if arguments.only in (None, name)}
    kinds = {
        kind: arguments.signals or count for kind, count in LONG["signals"].items() if arguments.only in (None, kind)
    }
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[dict[str, Any]] = []
    if arguments.only and arguments.output.exists():
        kept = json.loads(arguments.output.read_text())
        counts.update({name: Counter(found) for name, found in kept["counts"].items() if arguments.only not in name})
        failures = [failure for failure in kept["failures"] if arguments.only not in failure["where"]]
    with tempfile.TemporaryDirectory() as folder:
        sources = [("harness", {"programs": programs, "root": f"{folder}/programs", "seed": arguments.seed})]
        sources = sources if programs else []
        sources += [
            ("run_storm", {"kind": kind, "count": count, "root": f"{folder}/runs", "seed": arguments.seed})
            for kind, count in kinds.items()
        ]
        for module, settings in sources:
            for report in reports(module, settings):
                where = report.get("program") or f"spin run ({report.get('kind', settings.get('kind'))})"
                counts[where][report["how"]] += report.get("count", 1)
                if report.get("refused"):
                    counts[where]["damaged file refused by name"] += 1
                if report["wrong"]:
                    failures.append({"where": where, **report})
                    print(f"{where}: {report['how']} {report.get('at', '')}: {report['wrong']}", flush=True)
                result = {"seed": arguments.seed, "counts": counts, "failures": failures}
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
