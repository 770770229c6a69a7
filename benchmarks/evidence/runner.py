"""Runs the arms of a study one after the other: training, then every benchmark of every model. A rerun continues."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import (
    BASE_MODEL,
    BENCHMARKS,
    REPOSITORY,
    Arm,
    arms_of,
    config_path,
    find_study,
    run_folder,
)
from benchmarks.evidence.results import keep, keep_training, kept, result_path
from benchmarks.harness import TUNED_ALLOCATOR
from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic


@dataclass(frozen=True)
class Runner:
    """Where to find the base model, and how responses are generated.

    Attributes:
        model: folder of the base model.
        backend: that of ``evaluate_model.py``.
    """

    model: Path = BASE_MODEL
    backend: str = "transformers"

    def run(self, study: str, arm: str | None = None, seed: int | None = None) -> None:
        """Run the arms of a study that are not complete.

        Raises:
            InputError: the base model is missing, an arm needs another that has not run, or a program failed.
        """
        if not (self.model / "config.json").is_file():
            raise InputError(f"{self.model} contains no model: run scripts/fetch_smollm2.sh, or pass --model")
        for name, item, number in arms_of(study, arm, seed):
            self.train(study, name, item, number)
            for model, folder in item.models.items():
                for benchmark in (*find_study(study).benchmarks, *item.benchmarks):
                    for response_seed in BENCHMARKS[benchmark].seeds:
                        self.evaluate(study, name, item, number, model, folder, benchmark, response_seed)

    def train(self, study: str, name: str, arm: Arm, seed: int) -> None:
        """Start the program of an arm; a complete training is recognised by the program itself."""
        if not arm.program:
            return
        folder, config = run_folder(study, name, seed), config_path(study, name)
        start = self.start_of(study, arm)
        if not (start / "config.json").is_file():
            raise InputError(f"{name} starts from {start}, which is not complete: run the arm {arm.starts_from} first")
        if arm.program == "spin run":
            words = ["-m", "spin", "run", str(config), f"--run_dir={folder}", f"--model={start}"]
        else:
            words = [f"spin/{arm.program}", str(config), f"--output_dir={folder}/checkpoint"]
            words.append(f"--model_name_or_path={start}")
        cost = start_program([*words, f"--seed={seed}"], folder, "train")
        for model, part in arm.models.items():
            keep_training(folder / part, result_path(study, name, seed, model, "training"), cost)

    def start_of(self, study: str, arm: Arm) -> Path:
        """Return the model that an arm starts from."""
        if arm.starts_from == "base":
            return self.model
        return run_folder(study, arm.starts_from, 1) / find_study(study).arms[arm.starts_from].models["final"]

    def evaluate(
        self,
        study: str,
        name: str,
        arm: Arm,
        seed: int,
        model: str,
        folder: str,
        benchmark: str,
        response_seed: int,
    ) -> None:
        """Measure one model on one benchmark, unless the kept result is of these weights and settings."""
        source = run_folder(study, name, seed) / folder if arm.program else self.model
        kept_path = result_path(study, name, seed, model, benchmark, response_seed)
        flags = dict(BENCHMARKS[benchmark].flags) | {"backend": self.backend, "seed": response_seed}
        if kept(kept_path, source, flags):
            return
        output = run_folder(study, name, seed) / "evaluations" / model / kept_path.name
        words = ["spin/evaluate_model.py", "--model", str(source), "--output_file", str(output), *as_flags(flags)]
        cost = start_program(words, run_folder(study, name, seed), f"{model}-{kept_path.stem}")
        keep(output, kept_path, flags, cost)
        say(f"kept {kept_path.relative_to(REPOSITORY)}")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def start_program(words: Sequence[str], folder: Path, name: str) -> dict[str, float]:
    """Run a program of the project to its end; its output goes to ``folder/evidence-logs``. Return its cost: ``seconds`` and
    ``processor_seconds``, summed over all attempts, which are also recorded in ``folder/cost.json``.

    Raises:
        InputError: the program failed.
    """
    log = folder / "evidence-logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = TUNED_ALLOCATOR | {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    say(f"{time.strftime('%H:%M:%S')} {' '.join(words)}")
    costs_path = folder / "cost.json"
    costs = read_json(costs_path) if costs_path.is_file() else {}
    cost: dict[str, float] = costs.get(name, {"seconds": 0.0, "processor_seconds": 0.0})
    started, before = time.monotonic(), _processor_seconds()
    try:
        with log.open("ab") as file:
            code = subprocess.run(
                [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=file, stderr=file, check=False
            ).returncode
    finally:  # an interrupted attempt counts as well
        cost["seconds"] += time.monotonic() - started
        cost["processor_seconds"] += _processor_seconds() - before
        write_json_atomic(costs_path, costs | {name: cost})
    if code:
        raise InputError(f"{words[0]} ended with code {code}: see the end of {log}; the same command continues")
    return cost


def _processor_seconds() -> float:
    """Return the processor time of all programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
