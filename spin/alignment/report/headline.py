"""The headline of a run: which iteration is the best, by how much, and whether to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.evaluation.compare import MEASURES, Measure
from spin.alignment.evaluation.statistics import Z95, Comparison
from spin.alignment.report.verdicts import Responses, comparisons, measure_name, of_role, task_difference

START, CONTROL = "the SFT start", "continued SFT"


def headline(
    rows: Sequence[dict[str, Any]], responses: Responses, stopped: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return ``best`` (name of a model), ``measure`` (a key of the rows), ``sentence``, ``advice`` on further iterations, and
    ``caveats``: measures by which the best model is clearly worse than the start or the control. Empty without a scored policy.

    The best is the policy with the best value of the first of ``MEASURES`` that every policy has. ``stopped`` is the record of
    a run that ended early, whose reason then is the advice.
    """
    policies = [row for row in rows if row["role"] == "policy" and "n" in row]
    measure = next((item for item in MEASURES if policies and all(item.key in row for row in policies)), None)
    if measure is None:
        return {}
    best = max(policies, key=lambda row: measure.sign * row[measure.key])
    others = {START: of_role(rows, "start"), CONTROL: of_role(rows, "control")}
    compared = {name: comparisons(best, row, responses) for name, row in others.items() if row is not None}
    if stopped is not None:
        advice = f"The run stopped after iteration {stopped['iteration']}: {stopped['reason']}"
    else:
        advice = _advice(policies, best, measure, compared.get(START, {}).get(measure.key), responses)
    return {
        "best": best["model"],
        "measure": measure.key,
        "sentence": _sentence(best, measure, {name: found.get(measure.key) for name, found in compared.items()})
        + _wins(best),
        "advice": advice,
        "caveats": [
            f"{best['model']} is worse than {name} in {measure_name(item, best)}: {difference(found[item.key])}"
            for name, found in compared.items()
            for item in MEASURES
            if item.key in found and is_clearly(found[item.key], -item.sign)
        ]
        + _other_caveats(best, others[START]),
    }


def _wins(best: dict[str, Any]) -> str:
    """Return the win rate against the start as the end of a sentence; empty without one."""
    if best.get("win_rate") is None:
        return ""
    low, high = best.get("win_rate_interval", (best["win_rate"],) * 2)
    half = f" ± {(high - low) / 2:.1%}"
    return f"; it wins {best['win_rate']:.1%}{half} against {START}, {best['lc_win_rate']:.1%} at equal lengths"


def _other_caveats(best: dict[str, Any], start: dict[str, Any] | None) -> list[str]:
    """Return what the win rate and the benchmarks of the best model say against it."""
    found = []
    if best.get("win_rate_interval", (0.0, 1.0))[1] < 0.5:
        found.append(f"{best['model']} loses more comparisons with {START} than it wins: {best['win_rate']:.1%}")
    for name in best.get("tasks", {}) if start else ():
        compared = task_difference(best, start or {}, name)
        if compared is not None and compared[0] < -Z95 * compared[1]:
            found.append(
                f"{best['model']} is worse than {START} in {name}: {compared[0]:+.4f} ± {Z95 * compared[1]:.4f}"
            )
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Return a headline as lines of text; none if the run has none."""
    return [text for text in (found["sentence"], found["advice"], *found["caveats"]) if text] if found else []


def difference(found: Comparison) -> str:
    """Return a paired difference with half of its 95 % interval."""
    return f"{found.difference:+.3f} ± {Z95 * found.error:.3f}"


def is_clearly(found: Comparison, sign: int) -> bool:
    """Return whether a difference has this sign beyond chance at the 5 % level."""
    return found.is_clear and sign * found.difference > 0


def _sentence(best: dict[str, Any], measure: Measure, compared: dict[str, Comparison | None]) -> str:
    value = f"{measure_name(measure, best)} {best[measure.key]:.3f}"
    over = [f"{difference(found)} against {name}" for name, found in compared.items() if found is not None]
    against = ", ".join([value, *over])
    start = compared.get(START)
    if start is not None and not is_clearly(start, measure.sign):
        return f"No iteration is clearly better than {START}; the best is {best['model']}: {against}"
    control = compared.get(CONTROL)
    if control is not None and not is_clearly(control, measure.sign):
        return f"{best['model']} is the best, but not clearly better than {CONTROL}: {against}"
    return f"{best['model']} is the best: {against}"


def _advice(
    policies: Sequence[dict[str, Any]],
    best: dict[str, Any],
    measure: Measure,
    against_start: Comparison | None,
    responses: Responses,
) -> str:
    """Return what the last iteration says about further ones; empty if it cannot be compared."""
    last = policies[-1]
    if last is best and len(policies) == 1:
        gains = against_start is not None and is_clearly(against_start, measure.sign)
        return f"{last['model']} improves on its start: another iteration may help" if gains else ""
    other = policies[-2] if last is best else best
    found = comparisons(last, other, responses).get(measure.key)
    if found is None:
        return ""
    change = f"{last['model']} against {other['model']}: {difference(found)}"
    if is_clearly(found, measure.sign):
        return f"Still improving ({change}): another iteration may help"
    if is_clearly(found, -measure.sign):
        return f"The last iteration is worse ({change}): stop, and use {other['model']}"
    if against_start is not None and not is_clearly(against_start, measure.sign):
        return f"No clear change between iterations either ({change})"
    return f"The gain has levelled off ({change}, no clear change): more iterations of this kind promise little"
