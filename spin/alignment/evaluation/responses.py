"""``eval.parquet``: every held-out response of a model with its score, one row per prompt and temperature, and their averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink, read_rows
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.held_out_rows import Skipped
from spin.alignment.evaluation.held_out import HeldOut
from spin.alignment.evaluation.statistics import Estimate, mean, proportion, ratio
from spin.alignment.generation.base import Response
from spin.alignment.rewards.base import GroupScorer, PromptGroup

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("model", pa.string()),
        ("temperature", pa.float64()),
        ("prompt", pa.string()),
        ("ground_truth", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("score", pa.float64()),  # null if the scorer failed
        (
            "nats",
            pa.float64(),
        ),  # of the ground truth, EOS included: the same in every row of a prompt; null if not finite
        ("tokens", pa.int32()),  # of the ground truth, likewise
        (
            "parts",
            pa.list_(pa.struct([("name", pa.string()), ("total", pa.float64()), ("count", pa.float64())])),
        ),  # further numbers of the metric; null if it has none, or failed
        ("group", pa.string()),  # value of the column that group_by names; null without it
    ]
)
Row = Mapping[str, Any]
# Not in the files of earlier versions.
_LATER = ("group", "parts")


def responses_path(output_file: str | Path) -> Path:
    """Return where the responses of an evaluation are stored: next to its JSON file."""
    return Path(output_file).with_suffix(".parquet")


def scored_rows(
    model: str,
    temperature: float,
    held_out: Sequence[HeldOut],
    responses: Sequence[Response],
    texts: Sequence[str],
    scorer: GroupScorer,
    skipped: list[Skipped],
    group_by: str | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of one temperature, without the log-likelihoods; their group is the value of the column ``group_by``. A
    response that the scorer fails on has no score, and is added to ``skipped``.
    """
    rows = []
    for item, response, text in zip(held_out, responses, texts, strict=True):
        group = PromptGroup(item.request.prompt_id, item.messages, [text], item.ground_truth, columns=item.columns)
        try:
            labels = scorer.label([group])[0]
            score, parts = labels.scores[0], (labels.parts or [{}])[0]
        except InputError as error:
            score, parts = None, {}
            skipped.append({"prompt_id": group.prompt_id, "reason": f"temperature {temperature:g}: {error}"})
        rows.append(
            {
                "prompt_id": item.request.prompt_id,
                "model": model,
                "temperature": temperature,
                "prompt": item.prompt,
                "ground_truth": item.ground_truth,
                "response": text,
                "token_ids": list(response.token_ids),
                "finish_reason": response.finish_reason,
                "score": score,
                "parts": [{"name": name, "total": part.total, "count": part.count} for name, part in parts.items()]
                or None,
                "tokens": len(item.ground_truth_ids) or None,
                "group": None if group_by is None else str(item.columns[group_by]),
            }
        )
    return rows


def write_responses(path: Path, rows: Sequence[Row], provenance: Provenance) -> None:
    """Write the rows of all temperatures; the file appears only once it is complete."""
    with ParquetSink(path, SCHEMA, provenance) as sink:
        sink.write([dict(row) for row in rows])


def average_responses(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the averages over the responses of one temperature: ``exact`` (the mean score), ``identical_rate`` (if there is a
    ground truth), ``truncation_rate``, and ``mean_length`` in tokens, EOS included; each with ``_se`` and ``_interval`` (see
    ``statistics.py``). If the metric has further numbers, ``parts`` maps the name of each to ``value`` (likewise) and ``n``, the
    number of responses.

    Raises:
        InputError: no response has a score.
    """
    scores = [row["score"] for row in rows if row["score"] is not None]
    if not scores:
        raise InputError(
            f"the metric failed on every response, first on prompt {rows[0]['prompt_id']}: fix it or choose another"
        )
    answered = [row for row in rows if row["ground_truth"] is not None]
    same = sum(row["response"].strip() == row["ground_truth"].strip() for row in answered)
    truncated = sum(row["finish_reason"] == "length" for row in rows)
    return {
        **mean(scores).as_row("exact"),
        **(proportion(same, len(answered)).as_row("identical_rate") if answered else {}),
        **proportion(truncated, len(rows)).as_row("truncation_rate"),
        **mean([len(row["token_ids"]) for row in rows]).as_row("mean_length"),
        **({"parts": parts} if (parts := average_parts(rows)) else {}),
    }


def average_parts(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the further numbers of the metric over the responses of one temperature, by name; empty if it has none."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for part in row.get("parts") or ():
            found.setdefault(part["name"], []).append((part["total"], part["count"]))
    return {name: {**average_shares(shares).as_row("value"), "n": len(shares)} for name, shares in found.items()}


def average_shares(shares: Sequence[tuple[float, float]]) -> Estimate:
    """Return the sum of the totals divided by the sum of the counts; the sample is the prompts."""
    totals, counts = zip(*shares, strict=True)
    return mean(totals) if set(counts) == {1.0} else ratio(totals, counts)


def average_groups(parts: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Return for each group its size ``n`` and the averages by temperature, given the rows by temperature.

    Raises:
        InputError: no response of a group has a score.
    """
    names = dict.fromkeys(row["group"] for rows in parts.values() for row in rows)
    found = {}
    for name in names:
        own = {temperature: [row for row in rows if row["group"] == name] for temperature, rows in parts.items()}
        averages = {temperature: average_responses(rows) for temperature, rows in own.items()}
        found[name] = {"n": len(next(iter(own.values()))), "temperatures": averages}
    return found


def average_nats(rows: Sequence[Row]) -> dict[str, Any]:
    """Return ``nll``, nats per token of the ground truth over all tokens, and ``nll_sequence``, nats per ground truth; each with
    ``_se`` and ``_interval``. Nothing if no prompt has a ground truth. ``rows`` has one row per prompt.

    Raises:
        InputError: no prompt with a ground truth has a finite log-likelihood.
    """
    if all(row["ground_truth"] is None for row in rows):
        return {}
    known = [(row["nats"], row["tokens"]) for row in rows if row["nats"] is not None]
    if not known:
        raise InputError("the model gives no ground truth a finite log-likelihood: its weights are damaged")
    nats, tokens = zip(*known, strict=True)
    return {**ratio(nats, tokens).as_row("nll"), **mean(nats).as_row("nll_sequence")}


@dataclass
class HeldOutResponses:
    """The stored responses of one model without their ids: by temperature (as text such as "0.5"), then by prompt id."""

    by_temperature: dict[str, dict[str, Row]] = field(default_factory=dict)

    @property
    def by_prompt(self) -> dict[str, Row]:
        """One row per prompt: its log-likelihood is the same in all."""
        return next(iter(self.by_temperature.values()), {})


def read_responses(path: Path) -> HeldOutResponses:
    """Return the stored responses of an evaluation.

    Raises:
        InputError: the file is missing, damaged, or has other columns.
    """
    found = HeldOutResponses()
    expected = [name for name in SCHEMA.names if name != "token_ids"]  # long, and not compared
    columns = [name for name in expected if name not in _LATER]
    for row in read_rows(path, columns=expected):
        if missing := [name for name in columns if name not in row]:
            raise InputError(f"{path} has no column {missing[0]}: it is not the eval.parquet of an evaluation")
        found.by_temperature.setdefault(f"{row['temperature']:g}", {})[row["prompt_id"]] = row
    return found
