"""A model's responses compared with the stored responses of others to the same prompts: what the win rates are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.evaluation.responses import HeldOutResponses, Row, read_responses, responses_path
from spin.alignment.evaluation.win_rates import WinRate, win_rate
from spin.alignment.rewards.base import GroupLabels, GroupScorer, PromptGroup

if TYPE_CHECKING:
    from spin.alignment.evaluation.held_out import HeldOut

JUDGED_TOGETHER = 256  # prompts given to a scorer at a time, which bounds the memory of its inputs


@dataclass(frozen=True)
class Baseline:
    """A model to compare with: the name of its folder, the metric of its scores, and its responses."""

    name: str
    metric: str
    responses: HeldOutResponses


def read_baselines(paths: Sequence[str]) -> list[Baseline]:
    """Return the evaluations at these paths (eval.json or the parquet file next to it).

    Raises:
        InputError: one is missing or damaged, or two folders have the same name.
    """
    found: dict[str, Baseline] = {}
    for path in map(Path, paths):
        name = path.absolute().parent.name
        if name in found:
            raise InputError(f"against names two evaluations in folders called {name}: rename one of the folders")
        if not path.with_suffix(".json").is_file():
            raise InputError(f"against names {path}, which does not exist: give the eval.json of an evaluation")
        evaluation = read_json(path.with_suffix(".json"))
        if not isinstance(evaluation, dict) or "metric" not in evaluation:
            raise InputError(f"against names {path}, which is not the eval.json of an evaluation: correct it")
        found[name] = Baseline(name, evaluation["metric"], read_responses(responses_path(path)))
    return list(found.values())


def check_baselines(
    baselines: Sequence[Baseline], held_out: Sequence[HeldOut], temperature: float, metric: str | None
) -> None:
    """Check that responses can be compared, before a model is loaded; ``metric`` is that of the scores to compare, if any.

    Raises:
        InputError: a baseline has no response at the temperature to any of these prompts, or scores of another metric.
    """
    own = {item.request.prompt_id for item in held_out}
    for baseline in baselines:
        theirs = baseline.responses.by_temperature.get(f"{temperature:g}", {})
        if own.isdisjoint(theirs):
            raise InputError(
                f"{baseline.name} has no response at temperature {temperature:g} to any of these prompts: evaluate it with the "
                "same data and temperatures"
            )
        if metric is not None and baseline.metric != metric:
            raise InputError(
                f"{baseline.name} was scored by {baseline.metric}, not by {metric}: evaluate it with the same metric, or set "
                "win_rate_by"
            )


def judge_rows(
    rows: Sequence[dict[str, Any]],
    held_out: Mapping[str, HeldOut],
    baseline: Baseline,
    scorer: GroupScorer | None,
) -> None:
    """Add to each row the probability that its response beats that of a baseline (``wins``), where both are known.

    Sample i is compared with sample i of the baseline, or sample i modulo their number.

    Args:
        rows: of one temperature.
        held_out: the prompts by id.
        scorer: None: the stored scores of both are compared.
    """
    pairs = []
    for row in rows:
        theirs = baseline.responses.all_of(f"{row['temperature']:g}", row["prompt_id"])
        if theirs:
            pairs.append((row, theirs[row["sample_index"] % len(theirs)]))
    if scorer is None:
        values = [_higher(row["score"], other["score"]) for row, other in pairs]
    else:
        values = _compared(pairs, held_out, scorer)
    for (row, _), value in zip(pairs, values, strict=True):
        if value is not None:
            row["wins"] = [*(row.get("wins") or ()), {"against": baseline.name, "value": value}]


def _compared(
    pairs: Sequence[tuple[Row, Row]], held_out: Mapping[str, HeldOut], scorer: GroupScorer
) -> list[float | None]:
    groups = []
    for row, other in pairs:
        item = held_out[row["prompt_id"]]
        texts = [row["response"], other["response"]]
        groups.append(PromptGroup(row["prompt_id"], item.messages, texts, item.ground_truth, columns=item.columns))
    values: list[float | None] = []
    for start in range(0, len(groups), JUDGED_TOGETHER):
        values += [first_wins(labels) for labels in scorer.label(groups[start : start + JUDGED_TOGETHER])]
    return values


def first_wins(labels: GroupLabels) -> float | None:
    """Return the probability that the first of two responses is better; None if the scorer failed on either."""
    first, second = labels.scores
    if first is None or second is None:
        return None
    return _higher(first, second) if labels.win_probs is None else labels.win_probs[0][1]


def _higher(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    return 0.5 * (1.0 + (one > other) - (one < other))


def win_rate_of(rows: Sequence[Row], others: Mapping[str, Sequence[Row]], name: str) -> WinRate | None:
    """Return the win rate of the rows of one temperature by their ``wins`` against a baseline; None without any.

    A prompt with several responses counts once, with the mean of their values and lengths.

    Args:
        others: the baseline's responses by prompt id, whose lengths in characters are compared.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for win in row.get("wins") or ():
            if win["against"] == name:
                found.setdefault(row["prompt_id"], []).append((win["value"], len(row["response"])))
    if not found:
        return None
    values = [sum(value for value, _ in some) / len(some) for some in found.values()]
    excess = [
        sum(length for _, length in some) / len(some)
        - sum(len(row["response"]) for row in others[key]) / len(others[key])
        for key, some in found.items()
    ]
    return win_rate(values, excess)


def win_rate_by_scores(one: HeldOutResponses, other: HeldOutResponses, temperature: str) -> WinRate | None:
    """Return the win rate by the stored scores at a temperature: the higher one wins; None if no prompt has both."""
    values, excess = [], []
    for name in one.by_temperature.get(temperature, {}):
        mine, theirs = one.all_of(temperature, name), other.all_of(temperature, name)
        found = [
            value
            for index, row in enumerate(mine if theirs else ())
            if (value := _higher(row["score"], theirs[index % len(theirs)]["score"])) is not None
        ]
        if found:
            values.append(sum(found) / len(found))
            lengths = [sum(len(row["response"]) for row in some) / len(some) for some in (mine, theirs)]
            excess.append(lengths[0] - lengths[1])
    return win_rate(values, excess) if values else None
