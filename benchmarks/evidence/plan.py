"""The plan of the studies: which arms there are, what each starts from, and what every model is measured on.

The settings of an arm are the configuration of its name in ``benchmarks/results/evidence``, or one of the project that it
names, for ``spin run`` or a single program.
``docs/evidence.md`` is the protocol: why these arms, and what would refute each claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spin.alignment.core.errors import InputError, lookup

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "benchmarks" / "results" / "evidence"
# Relative to the folder of the repository, as the paths in the configurations are.
WORK = Path("runs/evidence")
DATA = WORK / "data"
BASE_MODEL = Path("models/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Benchmark:
    """Held-out prompts and how they are answered.

    Attributes:
        flags: of ``evaluate_model.py``.
        seeds: of the responses; several for best of n.
    """

    flags: Mapping[str, Any]
    seeds: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Arm:
    """One training, or (without a program) the sampling from a model that exists.

    Attributes:
        models: name of each model that is measured, and its folder in that of the arm.
        program: what is started with the configuration of this arm; empty: nothing is trained.
        starts_from: the base model, or the arm of the same study whose model this one starts from.
        seeds: of the training.
        benchmarks: what its models are measured on, besides the benchmarks of the study.
        config: a configuration of the project; empty: that of the arm's name.
    """

    models: Mapping[str, str]
    program: Literal["", "spin run", "run_sft.py"] = ""
    starts_from: str = "base"
    seeds: tuple[int, ...] = (1,)
    benchmarks: tuple[str, ...] = ()
    config: str = ""


@dataclass(frozen=True)
class Study:
    """Arms in the order in which they run, and what all of their models are measured on."""

    title: str
    benchmarks: tuple[str, ...]
    arms: Mapping[str, Arm] = field(default_factory=dict)


_GENERATION = {"dtype": "bfloat16", "max_new_tokens": 256, "batch_size": 64, "samples": 3}
BENCHMARKS: dict[str, Benchmark] = {
    "ifeval": Benchmark(_GENERATION | {"input_dir": DATA / "ifeval", "metric": "ifeval", "temperatures": [0]}),
    "ifeval_cooler": Benchmark(_GENERATION | {"input_dir": DATA / "ifeval", "metric": "ifeval", "temperatures": [0.5]}),
    "ifeval_sampled": Benchmark(
        _GENERATION | {"input_dir": DATA / "ifeval", "metric": "ifeval", "temperatures": [1]}, seeds=(1, 2, 3, 4)
    ),
    "instructions": Benchmark(
        _GENERATION
        | {"input_dir": "data/instructions", "metric": "instructions", "temperatures": [0, 1], "group_by": "group"}
    ),
    "gsm8k": Benchmark(
        _GENERATION | {"input_dir": DATA / "gsm8k", "metric": "math_answer", "temperatures": [0], "limit": 400}
    ),
    "gsm8k_sampled": Benchmark(
        _GENERATION | {"input_dir": DATA / "gsm8k", "metric": "math_answer", "temperatures": [1], "limit": 400},
        seeds=(1, 2, 3, 4, 5, 6, 7, 8),
    ),
    "alpaca": Benchmark(
        _GENERATION
        | {"input_dir": DATA / "alpaca", "metric": "benchmarks.evidence.scorers:chrf", "temperatures": [0, 1]}
    ),
}

_CHECKPOINT = {"final": "checkpoint"}
_SPIN = {f"iter{number}": f"iter{number}/checkpoint" for number in range(3)}
STUDIES: dict[str, Study] = {
    "base": Study(
        "the base model",
        (),
        {
            "start": Arm({"start": ""}, benchmarks=("ifeval", "gsm8k", "alpaca")),
            "sampling": Arm({"start": ""}, benchmarks=("instructions", "ifeval_cooler", "ifeval_sampled")),
        },
    ),
    "b": Study(
        "SPIN's own claim: self-play against continued SFT, from an SFT model that has converged",
        ("alpaca", "ifeval", "gsm8k"),
        {
            "sft": Arm(_CHECKPOINT, "run_sft.py"),
            "spin": Arm(_SPIN, "spin run", "sft", seeds=(1, 2, 3)),
            "continued_sft": Arm(_CHECKPOINT, "run_sft.py", "sft", seeds=(1, 2, 3)),
            "tspin": Arm(_SPIN, "spin run", "sft"),
            "space": Arm(_SPIN, "spin run", "sft"),
            "wspin": Arm({"iter0": "iter0/checkpoint"}, "spin run", "sft"),
        },
    ),
    "a": Study(
        "verifiable instructions: an external signal against continued SFT on accepted answers",
        ("ifeval", "instructions", "gsm8k", "alpaca"),
        {
            # The chat demo. Its control is SFT on the start model's own responses that pass (rejection sampling).
            "online_dpo": Arm(
                {"online": "online/checkpoint", "accepted_sft": "control/checkpoint"},
                "spin run",
                seeds=(1, 2, 3),
                config="configs/demo_chat.yaml",
            ),
            "sppo": Arm({"iter0": "iter0/checkpoint"}, "spin run", seeds=(1, 2, 3)),
            "spin_accepted": Arm({"iter0": "iter0/checkpoint"}, "spin run"),
        },
    ),
    "c": Study(
        "GSM8K: SFT to its plateau, then online DPO, SPIN and continued SFT",
        ("gsm8k", "gsm8k_sampled", "ifeval"),
        {
            "sft": Arm(_CHECKPOINT, "run_sft.py"),
            "online_dpo": Arm({"online": "online/checkpoint"}, "spin run", "sft"),
            "continued_sft": Arm(_CHECKPOINT, "run_sft.py", "sft"),
            "spin": Arm({"iter0": "iter0/checkpoint"}, "spin run", "sft"),
        },
    ),
}


def find_study(name: str) -> Study:
    """Return a study by name.

    Raises:
        InputError: there is none; the message lists them.
    """
    return lookup(STUDIES, name, "study")


def arms_of(study: str, arm: str | None, seed: int | None) -> list[tuple[str, Arm, int]]:
    """Return the arms to run with their seeds, in order: all, or one of them, with all of its seeds or one.

    Raises:
        InputError: there is no such study or arm, or the arm is not run with that seed.
    """
    arms = find_study(study).arms
    names = list(arms) if arm is None else [arm]
    if arm is not None:
        lookup(arms, arm, f"arm of study {study}")
    found = [(name, arms[name], number) for name in names for number in arms[name].seeds if seed in (None, number)]
    if not found:
        seeds = ", ".join(map(str, sorted({number for name in names for number in arms[name].seeds})))
        raise InputError(f"seed {seed} is not in the plan of study {study}: choose one of {seeds}")
    return found


def run_folder(study: str, arm: str, seed: int) -> Path:
    """Return the folder of a run, relative to the repository."""
    return WORK / study / f"{arm}-seed{seed}"


def config_path(study: str, arm: str) -> Path:
    """Return the configuration of an arm."""
    own = find_study(study).arms[arm].config
    return REPOSITORY / own if own else CONFIGS / study / f"{arm}.yaml"
