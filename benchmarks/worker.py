"""The program that runs one contender of the benchmark; started by ``harness.Worker`` with a job as its only argument."""

from __future__ import annotations

import json
import os
import sys

from benchmarks.contenders import CONTENDERS
from benchmarks.harness import Job, Turns
from benchmarks.sft_contenders import SFT_CONTENDERS

REGISTRIES = {"pairs": CONTENDERS, "sft": SFT_CONTENDERS}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    # Libraries may print: their output goes to the log, the answers to a separate pipe.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turns = Turns(job, sys.stdin, answers)
    REGISTRIES[job.benchmark][job.contender].run(job, turns)
    turns.finish()


if __name__ == "__main__":
    main()
