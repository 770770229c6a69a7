"""Verdicts: models compared on the same held-out prompts, one sentence for each pair of models and measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.evaluation.compare import MEASURES, Measure
from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.evaluation.statistics import Z95, Comparison
from spin.alignment.pipeline.stages.base import Role

Responses = Mapping[str, HeldOutResponses]


def measures_of(one: HeldOutResponses, other: HeldOutResponses) -> list[Measure]:
    """Return the measures that two models are compared by: ``MEASURES``, and for each group of rows those of responses."""
    groups = dict.fromkeys(row["group"] for row in one.by_prompt.values() if row.get("group") is not None)
    shared = [name for name in groups if any(row.get("group") == name for row in other.by_prompt.values())]
    of_groups = [
        Measure(group_key(item.key, name), f"{item.name} on {name}", item.temperature, group=name)
        for name in shared
        for item in MEASURES
        if item.temperature is not None
    ]
    return [*MEASURES, *of_groups]


def group_key(key: str, group: str) -> str:
    """Return the summary's name of a measure that is limited to a group of rows."""
    return f"{key}/{group}"


def measure_name(measure: Measure, row: dict[str, Any]) -> str:
    """Return the name of a measure by the metric that a model was scored by."""
    metric = "exact match" if row.get("metric", "exact_match") == "exact_match" else row["metric"]
    return measure.name.format(metric=metric)


def verdicts(rows: Sequence[dict[str, Any]], responses: Responses) -> list[str]:
    """Compare every model with the SFT start, every iteration with the one before, and the last iteration with the controls.

    ``rows`` are those of the summary, ``responses`` the stored responses by name of the model; one without any is not compared.
    """
    start, control = of_role(rows, "start"), of_role(rows, "control")
    lines = [line for row in rows if row is not start for line in verdict(row, start, "the SFT start", responses)]
    policies = [row for row in rows if row["role"] == "policy" and row["iteration"] is not None]
    for row in policies:
        plain = of_role([item for item in rows if item["iteration"] == row["iteration"]], "unweighted")
        if plain:
            lines += verdict(row, plain, f"SPIN without weights ({plain['model']})", responses)
        before = next((item for item in policies if item["iteration"] == row["iteration"] - 1), None)
        if before:
            lines += verdict(row, before, f"the iteration before ({before['model']})", responses)
    last = of_role([row for row in reversed(rows) if "exact_at" in row], "policy")
    if last and control:
        lines += verdict(last, control, "continued SFT", responses)
    if last and start and "sampled_exact" in last:
        cooler = {t: value for t, value in start.get("exact_at", {}).items() if 0 < float(t) < 1}
        lines += [
            f"temperature control: the SFT start sampled at T={t} reaches {value:.3f} without any training, {last['model']} "
            f"at T=1 {last['sampled_exact']:.3f}"
            for t, value in cooler.items()
        ]
    return lines


def win_verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one sentence for each win rate of a model, and for each benchmark against the start's.

    A benchmark is compared as if the documents of the two models were different, which overstates the error.
    """
    start, names = of_role(rows, "start"), {row["folder"]: row["model"] for row in rows if "folder" in row}
    lines = []
    for row in rows:
        for folder, found in row.get("win_rates", {}).items():
            clear = found["p_value"] < 0.05
            word = ("better" if found["wins"] > found["losses"] else "worse") if clear else "no clear difference"
            low, high = found.get("win_rate_interval", (found["win_rate"],) * 2)
            lines.append(
                f"{row['model']} against {names.get(folder, folder)}: wins {found['win_rate']:.1%} ({low:.1%} to {high:.1%}) of "
                f"{found['prompts']} prompts by {found['by']}, {found['lc_win_rate']:.1%} at equal lengths, ties "
                f"{found['tie_rate']:.1%}, p {p_text(found['p_value'])} ({word})"
            )
        if row is not start and start is not None:
            lines += task_verdicts(row, start)
    return lines


def task_verdicts(row: dict[str, Any], start: dict[str, Any]) -> list[str]:
    """Return one sentence for each benchmark that a model and the start both have with an error."""
    lines = []
    for name, found in row.get("tasks", {}).items():
        compared = task_difference(row, start, name)
        if compared is not None:
            difference, error = compared
            clear = abs(difference) > Z95 * error
            word = ("better" if difference > 0 else "worse") if clear else "no clear change"
            base = start["tasks"][name]["value"]
            lines.append(
                f"{row['model']} against the SFT start: {name} ({found['shots']}-shot) {base:.4f} -> {found['value']:.4f}, "
                f"difference {difference:+.4f} ± {Z95 * error:.4f} ({word})"
            )
    return lines


def task_difference(row: dict[str, Any], start: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return by how much a benchmark differs from the start's, and the standard error; None if either is unknown."""
    ours, base = row.get("tasks", {}).get(name, {}), start.get("tasks", {}).get(name, {})
    if "value_se" not in ours or "value_se" not in base:
        return None
    return ours["value"] - base["value"], (ours["value_se"] ** 2 + base["value_se"] ** 2) ** 0.5


def of_role(rows: Sequence[dict[str, Any]], role: Role) -> dict[str, Any] | None:
    """Return the first row of a role."""
    return next((row for row in rows if row["role"] == role), None)


def comparisons(row: dict[str, Any], other: dict[str, Any], responses: Responses) -> dict[str, Comparison]:
    """Return the comparison of a model with another by key of the measure; empty if either has no responses."""
    if row["model"] not in responses or other["model"] not in responses:
        return {}
    one, two = responses[row["model"]], responses[other["model"]]
    return {item.key: found for item in measures_of(one, two) if (found := item.compare(one, two)) is not None}


def verdict(row: dict[str, Any], other: dict[str, Any] | None, name: str, responses: Responses) -> list[str]:
    """Return one sentence per measure on a model against another, which is called ``name``; none if either has no responses."""
    lines = []
    compared = {} if other is None else comparisons(row, other, responses)
    if other is None or not compared:
        return []
    for measure in measures_of(responses[row["model"]], responses[other["model"]]):
        if measure.key not in compared:
            continue
        found = compared[measure.key]
        better = measure.sign * found.difference > 0
        word = ("better" if better else "worse") if found.is_clear else "no clear change"
        before, after = (measure.average(item) for item in (other, row))
        lines.append(
            f"{row['model']} against {name}: {measure_name(measure, row)} {before:.3f} -> {after:.3f}, difference "
            f"{found.difference:+.3f} ± {Z95 * found.error:.3f} on the same {found.prompts} prompts, p {p_text(found.p_value)} "
            f"({word})"
        )
    return lines


def p_text(p_value: float) -> str:
    """Return what follows "p": its value with two significant digits, or that it is below 0.0001."""
    return f"= {p_value:.2g}" if p_value >= 1e-4 else "< 0.0001"
