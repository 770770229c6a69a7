"""Verdicts: models compared on the same held-out prompts, one sentence for each pair of models and measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.evaluation.statistics import Z95, Comparison, compare_means, compare_ratios
from spin.alignment.pipeline.stages.base import Role


@dataclass(frozen=True)
class Measure:
    """A measure that models are compared by: its key in the summary, its name, and the temperature of the responses it scores
    (None: the log-likelihood of the ground truth, which is better when lower).
    """

    key: str
    name: str
    temperature: str | None

    @property
    def sign(self) -> int:
        """1 if higher values are better, -1 if lower ones are."""
        return -1 if self.temperature is None else 1

    def compare(self, one: HeldOutResponses, other: HeldOutResponses) -> Comparison | None:
        """Compare two models on the prompts that both have a value for; None for fewer than two prompts."""
        mine, theirs = self._rows(one), self._rows(other)
        shared = [(mine[name], theirs[name]) for name in mine if name in theirs]
        if len(shared) < 2:
            return None
        if self.temperature is None:
            ratios = [
                ([row["nats"] for row in side], [row["tokens"] for row in side]) for side in zip(*shared, strict=True)
            ]
            return compare_ratios(*ratios)
        return compare_means(*([row["score"] for row in side] for side in zip(*shared, strict=True)))

    def _rows(self, responses: HeldOutResponses) -> dict[str, Mapping[str, Any]]:
        rows = responses.by_prompt if self.temperature is None else responses.by_temperature.get(self.temperature, {})
        value = "nats" if self.temperature is None else "score"
        return {name: row for name, row in rows.items() if row[value] is not None}


MEASURES = (
    Measure("sampled_exact", "exact match at T=1", "1"),
    Measure("greedy_exact", "greedy exact match", "0"),
    Measure("nll", "NLL of the ground truth (nats per token)", None),
)
Responses = Mapping[str, HeldOutResponses]


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


def of_role(rows: Sequence[dict[str, Any]], role: Role) -> dict[str, Any] | None:
    """Return the first row of a role."""
    return next((row for row in rows if row["role"] == role), None)


def comparisons(row: dict[str, Any], other: dict[str, Any], responses: Responses) -> dict[str, Comparison]:
    """Return the comparison of a model with another by key of the measure; empty if either has no responses."""
    if row["model"] not in responses or other["model"] not in responses:
        return {}
    one, two = responses[row["model"]], responses[other["model"]]
    return {measure.key: found for measure in MEASURES if (found := measure.compare(one, two)) is not None}


def verdict(row: dict[str, Any], other: dict[str, Any] | None, name: str, responses: Responses) -> list[str]:
    """Return one sentence per measure on a model against another, which is called ``name``; none if either has no responses."""
    lines = []
    compared = {} if other is None else comparisons(row, other, responses)
    for measure in MEASURES:
        if other is None or measure.key not in compared:
            continue
        found = compared[measure.key]
        better = measure.sign * found.difference > 0
        word = ("better" if better else "worse") if found.is_clear else "no clear change"
        lines.append(
            f"{row['model']} against {name}: {measure.name} {other[measure.key]:.3f} -> {row[measure.key]:.3f}, difference "
            f"{found.difference:+.3f} ± {Z95 * found.error:.3f} on the same {found.prompts} prompts, p = {p_text(found.p_value)} "
            f"({word})"
        )
    return lines


def p_text(p_value: float) -> str:
    """Return a p-value with two significant digits, or that it is below 0.0001."""
    return f"{p_value:.2g}" if p_value >= 1e-4 else "below 0.0001"
