"""The studies of docs/evidence.md.

    bash scripts/fetch_smollm2.sh                                      # the model, once
    python -m benchmarks.evidence prepare --data data                  # public data sets -> runs/evidence/data
    python -m benchmarks.evidence run base                             # then b, a, c; the same command continues a stopped study
    python -m benchmarks.evidence run b --arm spin --seed 2
    python -m benchmarks.evidence table                                # docs/evidence.md and its plots, from the results so far

Everything is written under ``runs/evidence`` in the repository; results also to ``benchmarks/results/evidence``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.plan import BASE_MODEL, REPOSITORY, STUDIES
from spin.alignment.core.program import interrupt_on_signals, run_program


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("prepare", help="write the data of the studies")
    data.add_argument("--data", type=Path, default=Path("data"), help="folder with alpaca_demo, gsm8k and ifeval")
    run = commands.add_parser("run", help="run a study, or one of its arms")
    run.add_argument("study", help=", ".join(STUDIES))
    run.add_argument("--arm", help="one arm of the study (default: all, in order)")
    run.add_argument("--seed", type=int, help="one seed (default: all of the arm)")
    run.add_argument("--model", type=Path, default=BASE_MODEL, help="folder of the base model")
    run.add_argument("--backend", default="transformers", help="backend of the evaluations: transformers or vllm")
    commands.add_parser("table", help="write the tables and plots of docs/evidence.md")
    options = parser.parse_args(arguments)
    data_folder = Path(getattr(options, "data", "")).absolute()
    os.chdir(REPOSITORY)
    if options.command == "prepare":
        from benchmarks.evidence.data import prepare

        prepare(data_folder)
    elif options.command == "run":
        from benchmarks.evidence.runner import Runner

        interrupt_on_signals()
        Runner(options.model, options.backend).run(options.study, options.arm, options.seed)
    else:
        from benchmarks.evidence.tables import write_tables

        write_tables()


if __name__ == "__main__":
    run_program(main)
