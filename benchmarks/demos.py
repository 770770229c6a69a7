"""Collects the results of finished demo runs in benchmarks/results/demos.json; the tables of README and docs are made from it.

    bash scripts/demo.sh runs/seed1 --seed=1                                     # likewise for the other seeds and demos
    python benchmarks/demos.py demo runs/seed1 runs/seed2 runs/seed3             # also: chat, online, sppo, wspin
    python scripts/make_docs.py

The entry of that name is replaced, or with ``--add`` extended: ``machine``, and for each seed the rows of the run's
``summary.json`` with standard errors (``_se``), 95 % intervals (``_interval``), and the paired comparisons on the same
prompts with the SFT start (``against_start``) and with the control (``against_control``); ``groups`` has the scores of each
group of held-out rows.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.core.program import run_program

RESULTS = Path(__file__).parent / "results" / "demos.json"
MEASURED = (
    *("greedy_exact", "sampled_exact", "sampled_exact_t05", "nll", "identical_rate", "reward_accuracy", "margin"),
    *("chosen_drift", "mean_length", "truncation_rate"),
)
KEPT = (
    *("model", "metric", "n", "skipped"),
    *(f"{name}{part}" for name in MEASURED for part in ("", "_se", "_interval")),
    *("against_start", "against_control", "groups", "train_seconds", "pairs"),
)


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the entry of some runs of one demo, which differ in their seeds.

    Raises:
        InputError: a folder is not a finished run with a report, or two runs have the same seed.
    """
    from spin.alignment.pipeline.config import open_run

    seeds: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        seed = str(open_run(folder).seed)
        if seed in seeds:
            raise InputError(f"{folder} has seed {seed}, as an earlier run: give runs of different seeds")
        rows = read_json(folder / "summary.json")["rows"]
        if unscored := [row["model"] for row in rows if "greedy_exact_interval" not in row]:
            raise InputError(f"{folder}: {unscored[0]} has no intervals: evaluate it again with `spin run`")
        seeds[seed] = [{key: row[key] for key in KEPT if key in row} for row in rows]
    return {"machine": machine(), "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0])))}


def joined(earlier: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the seeds of both, ``entry``'s where both have one, and the machines of both."""
    seeds = earlier["seeds"] | entry["seeds"]
    machines = dict.fromkeys([*earlier["machine"].split("; "), entry["machine"]])
    return {"machine": "; ".join(machines), "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0])))}


def machine() -> str:
    """Return the processor and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="demos.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="entry of the results: demo, chat, online, sppo, wspin or a new one")
    parser.add_argument("folders", nargs="+", type=Path, help="run directories, one per seed")
    parser.add_argument(
        "--add", action="store_true", help="keep the entry's other seeds, whose runs may be on another machine"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to update")
    options = parser.parse_args(arguments)
    entry = collect(options.folders)
    known = read_json(options.out) if options.out.exists() else {}
    if options.add and options.name in known:
        entry = joined(known[options.name], entry)
    write_json_atomic(options.out, known | {options.name: entry})
    say(
        f"wrote {options.name}, seeds {', '.join(entry['seeds'])}, to {options.out}; now run python scripts/make_docs.py"
    )


if __name__ == "__main__":
    run_program(main)
