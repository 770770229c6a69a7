"""Averages over the held-out responses of a model, as they stand in ``eval.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.repeated import ks_of, majority_score, pass_at_k
from spin.alignment.evaluation.responses import Row
from spin.alignment.evaluation.statistics import Estimate, mean, ratio
from spin.alignment.evaluation.text_measures import distinct_n, repetition_rate

# Extracts what a majority votes on from the text of a response.
Answer = Callable[[str], Hashable | None]
DISTINCT = (1, 2)


def average_responses(rows: Sequence[Row], answer: Answer | None = None) -> dict[str, Any]:
    """Return the averages over the responses of one temperature, each with ``_se`` and ``_interval`` (``statistics.py``).

    ``exact`` (the mean score), ``identical_rate`` (if there is a ground truth), ``finished_rate`` (ended by EOS or a stop
    text), ``truncation_rate``, ``repetition_rate``, and ``mean_length`` in tokens, EOS included; without an error
    ``distinct_1`` and ``distinct_2``. With several responses to a prompt, a prompt counts once, with the mean of its responses,
    and there are also ``pass@k`` and ``maj@n`` (:func:`repeated_averages`). If the metric has further numbers, ``parts`` maps
    the name of each to ``value`` (likewise) and ``n``, the number of responses.

    Args:
        answer: what a majority votes on; None: there is no ``maj@n``.

    Raises:
        InputError: no response has a score.
    """
    if all(row["score"] is None for row in rows):
        raise InputError(
            f"the metric failed on every response, first on prompt {rows[0]['prompt_id']}: fix it or choose another"
        )
    groups = list(by_prompt(rows).values())
    said = [said_ids(row) for row in rows]
    # A distinct-n is a number of the whole set: it has no value for each prompt, and thus no error.
    distinct = {f"distinct_{n}": value for n in DISTINCT if (value := distinct_n(said, n)) is not None}
    return {
        **mean_of(groups, lambda row: row["score"]).as_row("exact"),
        **repeated_averages(groups, answer),
        **_optional("identical_rate", groups, _is_identical),
        **mean_of(groups, lambda row: float(row["finish_reason"] == "stop")).as_row("finished_rate"),
        **mean_of(groups, lambda row: float(row["finish_reason"] == "length")).as_row("truncation_rate"),
        **mean_of(groups, lambda row: repetition_rate(said_ids(row))).as_row("repetition_rate"),
        **mean_of(groups, lambda row: float(len(row["token_ids"]))).as_row("mean_length"),
        **distinct,
        **({"parts": parts} if (parts := average_parts(groups)) else {}),
    }


def by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each prompt, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def said_ids(row: Row) -> Sequence[int]:
    """Return the ids of a response without the one that ended it."""
    ids: Sequence[int] = row["token_ids"]
    return ids[:-1] if row["finish_reason"] == "stop" else ids


def mean_of(groups: Sequence[Sequence[Row]], value: Callable[[Row], float | None]) -> Estimate:
    """Return the mean over prompts of the mean over each prompt's responses; responses and prompts without a value are left out.

    The sample is the prompts: responses to one prompt are alike, and counting each would make the interval too narrow.
    """
    known = [[found for row in group if (found := value(row)) is not None] for group in groups]
    return mean([math.fsum(some) / len(some) for some in known if some])


def _is_identical(row: Row) -> float | None:
    return None if row["ground_truth"] is None else float(row["response"].strip() == row["ground_truth"].strip())


def _optional(key: str, groups: Sequence[Sequence[Row]], value: Callable[[Row], float | None]) -> dict[str, Any]:
    has_any = any(value(row) is not None for group in groups for row in group)
    return mean_of(groups, value).as_row(key) if has_any else {}


def repeated_averages(groups: Sequence[Sequence[Row]], answer: Answer | None) -> dict[str, Any]:
    """Return ``pass@k`` for the powers of two up to n, and n, if the n scores of every prompt are 0 or 1; and ``maj@n`` if
    answers can be extracted. Empty for one response to each prompt. Prompts on some of whose responses the metric failed are
    left out.
    """
    count = max(len(group) for group in groups)
    whole = [group for group in groups if len(group) == count and all(row["score"] is not None for row in group)]
    if count < 2 or not whole:
        return {}
    found: dict[str, Any] = {}
    if all(row["score"] in (0.0, 1.0) for group in whole for row in group):
        rights = [sum(row["score"] == 1.0 for row in group) for group in whole]
        for k in ks_of(count):
            found |= mean([pass_at_k(count, right, k) for right in rights]).as_row(f"pass@{k}")
    if answer is not None:
        votes = [
            majority_score([answer(row["response"]) for row in group], [row["score"] for row in group])
            for group in whole
        ]
        found |= mean(votes).as_row(f"maj@{count}")
    return found


def average_parts(groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Return the further numbers of the metric over the responses of one temperature, by name; empty if it has none."""
    found: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    for group in groups:
        own: dict[str, list[tuple[float, float]]] = {}
        for row in group:
            for part in row.get("parts") or ():
                own.setdefault(part["name"], []).append((part["total"], part["count"]))
        for name, shares in own.items():
            counts[name] = counts.get(name, 0) + len(shares)
            # The sum over a prompt's responses; divided by their number, so that a single one stays 0 or 1.
            totals, sizes = zip(*shares, strict=True)
            found.setdefault(name, []).append((math.fsum(totals) / len(shares), math.fsum(sizes) / len(shares)))
    return {name: {**average_shares(shares).as_row("value"), "n": counts[name]} for name, shares in found.items()}


def average_shares(shares: Sequence[tuple[float, float]]) -> Estimate:
    """Return the sum of the totals divided by the sum of the counts; the sample is the prompts."""
    totals, counts = zip(*shares, strict=True)
    return mean(totals) if set(counts) == {1.0} else ratio(totals, counts)


def average_groups(parts: Mapping[str, Sequence[Row]], answer: Answer | None = None) -> dict[str, dict[str, Any]]:
    """Return for each group its number of prompts ``n`` and the averages by temperature, given the rows by temperature.

    Raises:
        InputError: no response of a group has a score.
    """
    names = dict.fromkeys(row["group"] for rows in parts.values() for row in rows)
    found = {}
    for name in names:
        own = {temperature: [row for row in rows if row["group"] == name] for temperature, rows in parts.items()}
        averages = {temperature: average_responses(rows, answer) for temperature, rows in own.items()}
        found[name] = {"n": len(by_prompt(next(iter(own.values())))), "temperatures": averages}
    return found


def average_nats(rows: Sequence[Row]) -> dict[str, Any]:
    """Return ``nll``, nats per token of the ground truth over all tokens, and ``nll_sequence``, nats per ground truth; each with
    ``_se`` and ``_interval``. Nothing if no prompt has a ground truth. Of each prompt, the first row counts.

    Raises:
        InputError: no prompt with a ground truth has a finite log-likelihood.
    """
    firsts = [some[0] for some in by_prompt(rows).values()]
    if all(row["ground_truth"] is None for row in firsts):
        return {}
    known = [(row["nats"], row["tokens"]) for row in firsts if row["nats"] is not None]
    if not known:
        raise InputError("the model gives no ground truth a finite log-likelihood: its weights are damaged")
    nats, tokens = zip(*known, strict=True)
    return {**ratio(nats, tokens).as_row("nll"), **mean(nats).as_row("nll_sequence")}
