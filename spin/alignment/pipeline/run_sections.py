"""The sections of a run's configuration that belong to no program: its data, how programs are started, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import check_settings, default_of, setting
from spin.alignment.data.source_names import with_config


@dataclass(frozen=True)
class RunData:
    """Where prompts with ground truth come from."""

    train: str = setting(
        help="prompts, with ground truth where a stage learns from it, in any form that reformat.py reads",
        group="data",
        path="input",
    )
    test: str = setting("", "held-out prompts; without them no model is scored", path="input")
    train_split: str = setting("train", "split of the prompts to train on", path="name")
    test_split: str = setting("test", "split of the held-out prompts", path="name")
    config: str | None = setting(
        None,
        "configuration of the data sets, such as main of openai/gsm8k; or write openai/gsm8k:main where one is named",
    )
    test_pairs: bool = setting(
        False, "also generate for the held-out prompts: training then reports its metrics on held-out pairs"
    )
    prompts: str | list[str] = setting(
        "",
        "prompts that the model generates responses to: one data set, or a list with one for each iteration; they need no "
        "ground truth if the pairing needs none",
        unset="data.train",
        path="input",
    )
    prompts_split: str = setting("", "split of those prompts", unset="data.train_split", path="name")

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("train", "test", "prompts"):
            value = getattr(self, name)
            several = [with_config(item, self.config) for item in (value if isinstance(value, list) else [value])]
            object.__setattr__(self, name, several if isinstance(value, list) else several[0])

    def played(self, iteration: int = 0) -> tuple[str, str]:
        """Return the data set and the split whose prompts the model responds to in an iteration."""
        path = self.prompts[iteration] if isinstance(self.prompts, list) else self.prompts
        return path or self.train, self.prompts_split or self.train_split


@dataclass(frozen=True)
class LaunchConfig:
    """How and where the programs are started: plain Python for one process without ``config_file``, otherwise accelerate."""

    num_processes: int = setting(
        1,
        "processes of every training, on all machines together, and of generation and evaluation unless generate_processes "
        "says otherwise: one is plain Python, more use accelerate launch",
        group="launch",
        ge=1,
    )
    generate_processes: int | None = setting(
        None,
        "processes of generation and evaluation, an engine each; fewer than those of training if an engine has several GPUs",
        unset="launch.num_processes",
        ge=1,
    )
    config_file: str | None = setting(
        None, "configuration of accelerate launch, such as configs/multi_gpu.yaml", path="input"
    )
    stall_timeout: float = setting(
        7200.0,
        "seconds without output or a changed file after which a stage is ended, with what its processes are doing; 0: never",
        ge=0,
    )
    parallel: bool = setting(
        False,
        "train the control and score models in parallel with self-play, if there are free cores (on this machine, one thread "
        "each) or free machines (on a cluster)",
    )
    cluster: Literal["local", "ray", "slurm"] = setting(
        "local", "where the programs run: on this machine, or as tasks of a Ray or Slurm cluster (docs/multi_node.md)"
    )
    nodes: int = setting(1, "machines of a training or evaluation on a cluster, with equally many processes each", ge=1)
    gpus: bool = setting(
        True,
        "on a cluster, give each process that computes with a model a GPU of its own (an engine: tensor_parallel_size); false: "
        "machines without GPUs",
    )
    cpus: int = setting(1, "on a cluster, the cores of each process", ge=1)
    retries: int = setting(
        2,
        "on a cluster, how often a worker of a generation or a whole training is started again after it failed or its machine "
        "was lost; bad input is never tried again",
        ge=0,
    )
    sbatch: list[str] = setting([], "further options of sbatch, such as --partition=gpu and --time=24:00:00 (slurm)")

    def __post_init__(self) -> None:
        check_settings(self)
        defaults = {item.name: default_of(item) for item in fields(self)}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        for name in given:
            if self.cluster not in _CLUSTERS_OF.get(name, (self.cluster,)):
                raise InputError(
                    f"launch.{name} is for a cluster, but launch.cluster is {self.cluster}: remove it, or set launch.cluster to "
                    f"{' or '.join(_CLUSTERS_OF[name])}"
                )
        for name in ("num_processes", "generate_processes"):
            if (getattr(self, name) or self.nodes) % self.nodes:
                raise InputError(
                    f"launch.{name} is {getattr(self, name)}, which {self.nodes} machines (launch.nodes) cannot share equally: "
                    f"give a multiple of {self.nodes}"
                )
        if self.parallel and self.cluster == "local" and (self.num_processes > 1 or self.config_file):
            raise InputError("launch.parallel shares one machine between single processes: set it to false")

    def of_engines(self) -> LaunchConfig:
        """Return how generation and evaluation are started: with their own number of processes."""
        return replace(self, num_processes=self.generate_processes or self.num_processes)


# The settings that only a cluster has a use for, and which.
_CLUSTERS_OF = {**dict.fromkeys(("nodes", "gpus", "cpus", "retries"), ("ray", "slurm")), "sbatch": ("slurm",)}


# A measure of StopConfig, beside those of single models.
WIN_RATE = "win_rate"


@dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last iteration; decided after each iteration from the stored evaluations."""

    when: Literal["never", "no_improvement", "worse"] = setting(
        "never",
        "no_improvement: an iteration is not clearly better (p < 0.05) than the best model so far; worse: it is clearly worse",
        group="stop",
    )
    measure: Literal["sampled_exact", "greedy_exact", "nll", "win_rate"] | None = setting(
        None,
        "sampled_exact (T=1), greedy_exact, nll, or win_rate against the iteration before (evaluate.win_rate_by)",
        unset="the first of these that the evaluations have",
    )
    patience: int = setting(1, "successive iterations that must fail", ge=1)

    def __post_init__(self) -> None:
        check_settings(self)
