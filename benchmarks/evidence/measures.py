"""What the tables show of a model: its number in each measure with an interval, and its difference from another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import BENCHMARKS, STUDIES
from benchmarks.evidence.results import read_kept, result_path
from spin.alignment.evaluation.averages import average_shares
from spin.alignment.evaluation.compare import Measure
from spin.alignment.evaluation.responses import HeldOutResponses, responses_path
from spin.alignment.evaluation.statistics import Comparison, Estimate, bootstrap_difference

# The rows of one model in one measure: prompt -> (total, count).
Values = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Column:
    """A measure on one of the benchmarks.

    Attributes:
        benchmark: name in :data:`BENCHMARKS`.
        measure: what is averaged and compared.
        form: how a value is written.
        lower_is_better: for the words of a comparison.
    """

    benchmark: str
    measure: Measure
    form: str = "{:.3f}"
    lower_is_better: bool = False


COLUMNS = (
    Column("ifeval", Measure("prompt_strict", "IFEval prompt, strict", "0", part="prompt_strict")),
    Column("ifeval", Measure("prompt_loose", "IFEval prompt, loose", "0", part="prompt_loose")),
    Column("ifeval", Measure("instruction_strict", "IFEval instruction, strict", "0", part="instruction_strict")),
    Column("ifeval", Measure("instruction_loose", "IFEval instruction, loose", "0", part="instruction_loose")),
    Column("instructions", Measure("held_out_prompts", "held-out prompts, greedy", "0", group="held-out prompts")),
    Column("instructions", Measure("held_out_kinds", "held-out kinds, greedy", "0", group="held-out kinds")),
    Column("gsm8k", Measure("gsm8k", "GSM8K, greedy", "0")),
    Column("alpaca", Measure("nll", "NLL", None), lower_is_better=True),
    Column("alpaca", Measure("chrf", "chrF, greedy", "0")),
)


@dataclass(frozen=True)
class Trained:
    """A model of a study, in all of its seeds."""

    study: str
    arm: str
    model: str

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.arm if self.model == "final" else f"{self.arm} {self.model}" if self.arm != self.model else self.arm

    def seeds(self, benchmark: str) -> list[int]:
        """Return the seeds that have a result on a benchmark."""
        planned = STUDIES[self.study].arms[self.arm].seeds
        paths = {seed: result_path(self.study, self.arm, seed, self.model, benchmark) for seed in planned}
        return [seed for seed, path in paths.items() if path.is_file() and responses_path(path).is_file()]

    def result(self, benchmark: str, seed: int, response_seed: int = 1) -> tuple[dict[str, Any], HeldOutResponses]:
        """Return the averages and the responses of a result that exists."""
        return cached(result_path(self.study, self.arm, seed, self.model, benchmark, response_seed))

    def values(self, column: Column, seed: int) -> Values:
        """Return total and count of every prompt."""
        return column.measure.values(self.result(column.benchmark, seed)[1])


@cache
def cached(path: Path) -> tuple[dict[str, Any], HeldOutResponses]:
    """Return :func:`read_kept`, once."""
    return read_kept(path)


def estimate(values: Values) -> Estimate:
    """Return the average over prompts."""
    return average_shares(list(values.values()))


def cell(estimates: Sequence[Estimate], form: str) -> str:
    """Return ``mean ±half (lowest to highest seed)``; a dash without any. Seeds have their own responses, so their errors add up
    as independent ones.
    """
    if not estimates:
        return "–"
    numbers = [item.value for item in estimates]
    halves = [(item.interval[1] - item.interval[0]) / 2 for item in estimates if item.interval is not None]
    text = form.format(sum(numbers) / len(numbers))
    if len(halves) == len(numbers):
        text += f" ±{form.format(math.hypot(*halves) / len(halves))}"
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return text + (f" ({low} to {high})" if low != high else "")


@dataclass(frozen=True)
class Difference:
    """A model against another in one measure: each seed on the same prompts, and the mean over seeds.

    Attributes:
        seeds: the paired comparison of each seed.
        mean: the mean over seeds, with prompts and seeds resampled.
        p_value: of the first seed; with several seeds, from the resampled mean (normal).
    """

    seeds: list[Comparison]
    mean: Estimate
    p_value: float


def paired_seeds(one: Trained, other: Trained, benchmark: str) -> list[tuple[int, int]]:
    """Return the seeds of two models that are compared: the same, or, where the other has one seed only, that one."""
    ours, theirs = one.seeds(benchmark), other.seeds(benchmark)
    return [(seed, seed if seed in theirs else theirs[0]) for seed in ours] if theirs else []


def win_rates(one: Trained, other: Trained, column: Column) -> list[Estimate]:
    """Return for each seed the share of prompts on which a model scores higher than another; a tie counts one half."""
    found = []
    for seed, base in paired_seeds(one, other, column.benchmark):
        mine, theirs = one.values(column, seed), other.values(column, base)
        margins = [mine[name][0] - theirs[name][0] for name in mine if name in theirs]
        found.append(average_shares([(0.5 if margin == 0 else float(margin > 0), 1.0) for margin in margins]))
    return found


def difference(one: Trained, other: Trained, column: Column) -> Difference | None:
    """Compare two models in a measure, seed by seed (:func:`paired_seeds`); None without results."""
    found, values = [], []
    for seed, base in paired_seeds(one, other, column.benchmark):
        compared = column.measure.compare(
            one.result(column.benchmark, seed)[1], other.result(column.benchmark, base)[1]
        )
        if compared is not None:
            found.append(compared)
            values.append((one.values(column, seed), other.values(column, base)))
    if not found:
        return None
    if len(found) == 1:
        only = found[0]
        half = 1.96 * only.error
        mean = Estimate(only.difference, only.error, (only.difference - half, only.difference + half))
        return Difference(found, mean, only.p_value)
    shared = sorted(set.intersection(*(set(mine) & set(base) for mine, base in values)))
    mean = bootstrap_difference(
        [[mine[name] for name in shared] for mine, _ in values],
        [[base[name] for name in shared] for _, base in values],
    )
    assert mean.error is not None
    p_value = math.erfc(abs(mean.value) / mean.error / math.sqrt(2)) if mean.error else float(mean.value == 0)
    return Difference(found, mean, p_value)


def best_of(model: Trained, benchmark: str, part: str = "") -> tuple[Estimate, Estimate] | None:
    """Return the mean score of a single sample, and the share of prompts with at least one right sample (best of n by the
    benchmark's own checker, pass@n); None until all samples are there.
    """
    paths = [
        result_path(model.study, model.arm, 1, model.model, benchmark, seed) for seed in BENCHMARKS[benchmark].seeds
    ]
    if not all(path.is_file() for path in paths):
        return None
    measure = Measure(benchmark, benchmark, "1", part=part)
    samples = [measure.values(cached(path)[1]) for path in paths]
    shared = [name for name in samples[0] if all(name in sample for sample in samples)]
    single = {name: (sum(sample[name][0] for sample in samples) / len(samples), 1.0) for name in shared}
    best = {name: (max(sample[name][0] for sample in samples), 1.0) for name in shared}
    return estimate(single), estimate(best)
