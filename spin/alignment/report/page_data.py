"""The data of the page's scripts: what the charts and the browser of responses draw, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spin.alignment.evaluation.responses import HeldOutResponses
from spin.alignment.report.collected import Collected
from spin.alignment.report.curves import length_histograms, training_curves
from spin.alignment.report.samples import all_samples
from spin.alignment.report.summary import IDENTITY, exact_key

# What the scores are broken down by, each with the end of a chart's title.
BREAKDOWNS = {"groups": "by group", "parts": "parts"}
CURVES = 8  # in one chart of a breakdown: as many as there are colours
# Charts over the iterations after those of the scores: (key of the summary's rows, title).
MEASURES = (
    ("win_rate", "Win rate against SFT"),
    ("lc_win_rate", "Win rate against SFT at equal lengths"),
    ("nll", "NLL of the ground truth (nats per token)"),
    ("mean_length", "Mean length of responses (tokens)"),
    ("truncation_rate", "Share of truncated responses"),
    ("repetition_rate", "Share of 4-grams that a response repeats"),
    ("distinct_2", "Distinct-2 of all responses"),
    ("identical_rate", "Share of generated responses equal to the ground truth"),
    ("reward_accuracy", "Reward accuracy (last log of training)"),
    ("margin", "Margin (last log; nats, times beta)"),
    ("chosen_drift", "Chosen drift (last log; nats)"),
    ("rejected_drift", "Rejected drift (last log; nats)"),
)


def page_data(labelled: Sequence[tuple[str, Collected]], with_samples: bool = True) -> dict[str, Any]:
    """Return the data of one run, with an empty label, or of several runs, whose models are named ``label: model``.

    Without samples, the responses of the runs are not side by side: they answer different prompts.
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, Any]] = {}
    responses: dict[str, HeldOutResponses] = {}
    lengths: dict[str, dict[str, dict[str, int]]] = {}
    for label, found in labelled:
        rows += [_row(label, row) for row in found.summary["rows"]]
        metrics |= {named(label, name): content for name, content in found.metrics.items()}
        responses |= {named(label, name): content for name, content in found.responses.items()}
        lengths |= {named(label, name): content for name, content in found.lengths.items()}
    order = [row["model"] for row in rows if row["model"] in responses]
    samples = all_samples({name: responses[name] for name in order} if with_samples else {}, lengths)
    return {
        "runs": [label for label, _ in labelled],
        "rows": rows,
        "measures": [(key, title) for key, title in _measures(rows) if any(key in row for row in rows)],
        "breakdowns": breakdowns(rows, max(1, CURVES // len(labelled))) if labelled else [],
        "training": training_curves(metrics),
        "lengths": length_histograms({name: lengths[name] for name in order}, list(samples["answers"])),
        "samples": samples,
    }


def named(label: str, model: str) -> str:
    """Return how a model is called on the page of several runs."""
    return f"{label}: {model}" if label else model


def breakdowns(rows: Sequence[dict[str, Any]], names_in_chart: int) -> list[dict[str, Any]]:
    """Return the charts of the scores of groups and of the parts of a metric: ``title``, ``kind`` (groups or parts), ``key`` (of
    the score at a temperature) and ``names`` (a curve for each).
    """
    found = []
    for kind, ending in BREAKDOWNS.items():
        for key, title in _scores(rows):
            names = list(dict.fromkeys(name for row in rows for name, own in row[kind].items() if key in own))
            count = -(-len(names) // names_in_chart)
            for number in range(count):
                place = f" ({number + 1} of {count})" if count > 1 else ""
                some = names[number * names_in_chart : (number + 1) * names_in_chart]
                found.append({"title": f"{title}, {ending}{place}", "kind": kind, "key": key, "names": some})
    return found


def _row(label: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the finite numbers of a row with their intervals, under the names of the page."""
    identity = {key: row[key] for key in IDENTITY}
    facts = {"model": named(label, row["model"]), "label": row["model"], "run": label, "metric": row.get("metric")}
    parts = {kind: {name: _numbers(own) for name, own in row.get(kind, {}).items()} for kind in BREAKDOWNS}
    return _numbers(row) | identity | facts | parts | {"temperatures": list(row.get("exact_at", {}))}


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Return the finite numbers of a row, and the intervals with finite ends."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    return numbers | {
        key: value for key, value in row.items() if key.endswith("_interval") and all(map(math.isfinite, value))
    }


def _measures(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [*_scores(rows), *MEASURES]


def _scores(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the key and the title of the score at each temperature."""
    temperatures = sorted({t for row in rows for t in row["temperatures"]}, key=float)
    metric = ", ".join(sorted({row["metric"].replace("_", " ") for row in rows if row["metric"]}))
    scores = [(exact_key(t), f"{metric}, {'greedy' if t == '0' else f'T={t}'}".capitalize()) for t in temperatures]
    return [(key, title.replace(", t=", ", T=")) for key, title in scores]
