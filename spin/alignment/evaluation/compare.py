"""Two models compared by one measure on the same held-out prompts, from their stored responses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.evaluation.statistics import Comparison, compare_means, compare_ratios


@dataclass(frozen=True)
class Measure:
    """A measure that models are compared by.

    Attributes:
        key: its key in a summary.
        name: its name for readers; ``{metric}`` stands for that of the evaluation.
        temperature: that of the responses it scores; None: the log-likelihood of the ground truth, which is better when lower.
        part: one of the further numbers of the metric; empty: the metric itself.
        group: the rows that it is limited to; None: all.
    """

    key: str
    name: str
    temperature: str | None
    part: str = ""
    group: str | None = None

    @property
    def sign(self) -> int:
        """1 if higher values are better, -1 if lower ones are."""
        return -1 if self.temperature is None else 1

    def compare(self, one: HeldOutResponses, other: HeldOutResponses) -> Comparison | None:
        """Compare two models on the prompts that both have a value for; None for fewer than two prompts."""
        mine, theirs = self.values(one), self.values(other)
        shared = [(mine[name], theirs[name]) for name in mine if name in theirs]
        if len(shared) < 2:
            return None
        ours, base = ([*zip(*side, strict=True)] for side in zip(*shared, strict=True))
        if set(ours[1]) | set(base[1]) == {1.0}:
            return compare_means(ours[0], base[0])
        return compare_ratios((ours[0], ours[1]), (base[0], base[1]))

    def average(self, row: Mapping[str, Any]) -> float:
        """Return the average of a model in its row of the summary."""
        found = row if self.group is None else row["groups"][self.group]
        return float(found[self.key.partition("/")[0]])

    def values(self, responses: HeldOutResponses) -> dict[str, tuple[float, float]]:
        """Return total and count of each prompt that has a value: nats and tokens, a part's, or the score and 1.

        Those of a prompt with several responses are the means over them.
        """
        if self.temperature is None:
            found = {name: [self._value(row)] for name, row in responses.by_prompt.items()}
        else:
            names = responses.by_temperature.get(self.temperature, {})
            found = {name: [*map(self._value, responses.all_of(self.temperature, name))] for name in names}
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        return {
            name: (math.fsum(total for total, _ in some) / len(some), math.fsum(count for _, count in some) / len(some))
            for name, some in known.items()
            if some
        }

    def _value(self, row: Mapping[str, Any]) -> tuple[float, float] | None:
        if self.group not in (None, row.get("group")):
            return None
        if self.temperature is None:
            return None if row["nats"] is None else (row["nats"], float(row["tokens"]))
        if self.part:
            parts = {part["name"]: (part["total"], part["count"]) for part in row.get("parts") or ()}
            return parts.get(self.part)
        return None if row["score"] is None else (row["score"], 1.0)


MEASURES = (
    Measure("sampled_exact", "{metric} at T=1", "1"),
    Measure("greedy_exact", "greedy {metric}", "0"),
    Measure("nll", "NLL of the ground truth (nats per token)", None),
)
