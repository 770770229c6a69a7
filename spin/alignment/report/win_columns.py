"""Win rates in the rows of a summary: those of an evaluation's scorer, or else of the scores that it stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spin.alignment.evaluation.judged import win_rate_by_scores
from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.report.verdicts import of_role

_SHOWN = ("win_rate", "lc_win_rate", "tie_rate")


def add_win_rates(rows: Sequence[dict[str, Any]], responses: Mapping[str, HeldOutResponses]) -> None:
    """Add to the rows of all models but the start ``win_rates`` by folder of the model compared with, unless a scorer has
    compared them already; and ``win_rate``, ``lc_win_rate`` and ``tie_rate``, which are those against the start.

    Scores that are all 0 or 1 give no win rate of their own: it would be half the difference of the means, plus one half.
    """
    start = of_role(rows, "start")
    policies = {row["iteration"]: row for row in rows if row["role"] == "policy"}
    for row in rows:
        if row is start:
            continue
        before = policies.get(row["iteration"] - 1) if row["iteration"] is not None else None
        for other in (start, before if row["role"] == "policy" else None):
            _add_by_scores(row, other, responses)
        found = row.get("win_rates", {}).get((start or {}).get("folder"), {})
        row |= {key: value for key, value in found.items() if key.startswith(_SHOWN)}


def _add_by_scores(
    row: dict[str, Any], other: dict[str, Any] | None, responses: Mapping[str, HeldOutResponses]
) -> None:
    if other is None or "folder" not in other or other["folder"] in row.get("win_rates", {}):
        return
    if row["model"] not in responses or other["model"] not in responses or row.get("metric") != other.get("metric"):
        return
    one, two = responses[row["model"]], responses[other["model"]]
    temperature = next((name for name in one.by_temperature if name in two.by_temperature), None)
    if temperature is None or not (_is_graded(one, temperature) or _is_graded(two, temperature)):
        return
    if (rate := win_rate_by_scores(one, two, temperature)) is not None:
        found = {"by": row["metric"], "temperature": temperature, **rate.as_row()}
        row.setdefault("win_rates", {})[other["folder"]] = found


def _is_graded(responses: HeldOutResponses, temperature: str) -> bool:
    return any(row["score"] not in (None, 0.0, 1.0) for row in responses.by_temperature[temperature].values())
