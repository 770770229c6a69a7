"""The stop rule of a run: whether the scores of its iterations say that further ones are not worth their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.evaluation.compare import MEASURES, Measure
from spin.alignment.evaluation.responses import HeldOutResponses, read_responses, responses_path
from spin.alignment.evaluation.statistics import Z95
from spin.alignment.pipeline.config import RunConfig, StopConfig
from spin.alignment.pipeline.run_sections import WIN_RATE
from spin.alignment.pipeline.stages.evaluate import START


@dataclass(frozen=True)
class Change:
    """How a model compares with another: ``sign`` is 1 or -1 if it is clearly better or worse, otherwise 0."""

    sign: int
    text: str


@dataclass(frozen=True)
class Stopped:
    """The last iteration of a run that stopped early, the best model so far, and the reason as a sentence."""

    iteration: int
    best: str
    reason: str


Compare = Callable[[str, str], Change]


def stop_of(config: RunConfig, iteration: int) -> Stopped | None:
    """Return why a run ends after an iteration, whose model and those before it have been evaluated; None if it goes on.

    It depends on the stored evaluations alone, so a rerun comes to the same result.

    Raises:
        InputError: an evaluation lacks the measure of the rule.
    """
    rule = config.stop
    if rule.when == "never" or iteration + 1 >= config.iterations:
        return None
    folders = [START, *(f"iter{number}" for number in range(iteration + 1))]
    paths = {name: Path(config.run_dir) / name / "eval.json" for name in folders}
    compare = _by_wins(paths) if rule.measure == WIN_RATE else _by_measure(paths, rule.measure)
    return decide(rule, folders, compare)


def decide(rule: StopConfig, models: Sequence[str], compare: Compare) -> Stopped | None:
    """Return why the rule stops after the last of the models; None if it does not.

    ``models`` are the start and the iterations in order. Each iteration is compared with the best model before it (for win
    rates, which are only known for neighbours, with the one directly before it), and becomes the best if it is clearly better.
    The run stops after ``patience`` successive iterations that fail: with ``no_improvement`` those that are not clearly better,
    with ``worse`` those that are clearly worse.
    """
    best, failures, change = models[0], 0, Change(0, "")
    for number, model in enumerate(models[1:]):
        other = models[number] if rule.measure == WIN_RATE else best
        change = compare(model, other)
        fails = change.sign <= 0 if rule.when == "no_improvement" else change.sign < 0
        failures = failures + 1 if fails else 0
        best = model if change.sign > 0 else best
        if failures >= rule.patience:
            word = "clearly worse" if change.sign < 0 else "not clearly better"
            times = f", the {failures} iterations since {best} all failing" if failures > 1 else ""
            return Stopped(number, best, f"{model} is {word} than {other} ({change.text}){times}")
    return None


def _by_measure(paths: Mapping[str, Path], key: str | None) -> Compare:
    responses: dict[str, HeldOutResponses] = {
        name: read_responses(responses_path(path)) for name, path in paths.items()
    }
    measure = _measure(responses, key)

    def compare(one: str, other: str) -> Change:
        found = measure.compare(responses[one], responses[other])
        if found is None:
            raise InputError(
                f"the stop rule compares {measure.key}, but {one} and {other} share fewer than two prompts that have it: "
                "evaluate more, or set stop.when to never"
            )
        better = measure.sign * found.difference > 0
        sign = (1 if better else -1) if found.is_clear else 0
        return Change(sign, f"{measure.key} {found.difference:+.3f} ± {Z95 * found.error:.3f}")

    return compare


def _measure(responses: Mapping[str, HeldOutResponses], key: str | None) -> Measure:
    """Return the measure with a key; without one, the first that every model has, as in the headline."""
    known = [item for item in MEASURES if all(item.values(found) for found in responses.values())]
    found = next((item for item in known if key in (None, item.key)), None)
    if found is None:
        names = ", ".join(item.key for item in known) or "none"
        raise InputError(
            f"stop.measure is {key or 'not set'}, but the evaluations of this run have {names}: choose one of them, or add its "
            "temperature to evaluate.temperatures"
        )
    return found


def _by_wins(paths: Mapping[str, Path]) -> Compare:
    def compare(one: str, other: str) -> Change:
        evaluation: dict[str, Any] = read_json(paths[one])
        found = evaluation.get("win_rates", {}).get(other)
        if found is None:
            raise InputError(
                f"stop.measure is {WIN_RATE}, but {paths[one]} has none against {other}: set evaluate.win_rate_by"
            )
        sign = (1 if found["wins"] > found["losses"] else -1) if found["p_value"] < 0.05 else 0
        return Change(sign, f"it wins {found['win_rate']:.1%}, {found['lc_win_rate']:.1%} at equal lengths")

    return compare
