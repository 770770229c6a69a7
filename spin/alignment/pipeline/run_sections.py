"""The sections of a run's configuration that belong to no program: its data, how programs are started, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spin.alignment.core.settings import check_settings, setting
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
    """How the GPU programs are started: plain Python for one process without ``config_file``, otherwise accelerate."""

    num_processes: int = setting(
        1,
        "processes for generation and for every training: one is plain Python, more use accelerate launch",
        group="launch",
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
        False, "train the control and score models in parallel with self-play, one thread each, if there are free cores"
    )

    def __post_init__(self) -> None:
        check_settings(self)


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
