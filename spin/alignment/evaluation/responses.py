"""``eval.parquet``: every held-out response of a model with its score, one row per prompt, temperature and sample."""

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
from spin.alignment.generation.base import Response
from spin.alignment.rewards.base import GroupLabels, GroupScorer, Part, PromptGroup
from spin.alignment.rewards.rules import RuleScorer

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
        ("sample_index", pa.int32()),  # which of the responses at this temperature
        (
            "wins",
            pa.list_(pa.struct([("against", pa.string()), ("value", pa.float64())])),
        ),  # the probability that it is better than the response of each model compared with; null without any
    ]
)
Row = Mapping[str, Any]
# Not in the files of earlier versions.
_LATER = ("group", "parts", "sample_index", "wins")


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
    sample_index: int = 0,
) -> list[dict[str, Any]]:
    """Return the rows of one response to each prompt, without the log-likelihoods; their group is the value of the column
    ``group_by``. A response that a rule fails on, or a judge gives no verdict on, has no score, and is added to ``skipped``.

    The score is that of a rule or reward model; of a scorer that compares pairs, the probability to beat the ground truth.

    Raises:
        InputError: a model cannot score a response; the message names it.
    """
    groups = [
        PromptGroup(item.request.prompt_id, item.messages, [text], item.ground_truth, columns=item.columns)
        for item, text in zip(held_out, texts, strict=True)
    ]
    rows = []
    scored = zip(held_out, responses, texts, score_groups(scorer, groups), strict=True)
    for item, response, text, (score, parts, failure) in scored:
        if score is None:
            skipped.append({"prompt_id": item.request.prompt_id, "reason": f"temperature {temperature:g}: {failure}"})
        rows.append(
            {
                "prompt_id": item.request.prompt_id,
                "model": model,
                "temperature": temperature,
                "sample_index": sample_index,
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


def score_groups(
    scorer: GroupScorer, groups: Sequence[PromptGroup]
) -> list[tuple[float | None, Mapping[str, Part], str]]:
    """Return score, further numbers, and the reason if there is no score, for groups of one response each."""
    if not isinstance(scorer, RuleScorer):  # models score batches
        return [(_single_score(labels), {}, "the judge gave no verdict") for labels in scorer.label(groups)]
    found: list[tuple[float | None, Mapping[str, Part], str]] = []
    for group in groups:
        try:
            labels = scorer.label([group])[0]
        except InputError as error:
            found.append((None, {}, str(error)))
        else:
            found.append((labels.scores[0], (labels.parts or [{}])[0], ""))
    return found


def _single_score(labels: GroupLabels) -> float | None:
    """Return the score of a group's only response; from comparisons, its probability to beat the ground truth.

    The label is then the mean over the response itself (one half) and the ground truth: (1/2 + p) / 2.
    """
    score = labels.scores[0]
    return score if score is None or labels.win_probs is None else 2.0 * score - 0.5


def write_responses(path: Path, rows: Sequence[Row], provenance: Provenance) -> None:
    """Write the rows of all temperatures; the file appears only once it is complete."""
    with ParquetSink(path, SCHEMA, provenance) as sink:
        sink.write([dict(row) for row in rows])


@dataclass
class HeldOutResponses:
    """The stored responses of one model without their ids: by temperature (as text such as "0.5"), then by prompt id.

    ``by_temperature`` has the first response to each prompt, ``further`` the others, if the model was sampled several times.
    """

    by_temperature: dict[str, dict[str, Row]] = field(default_factory=dict)
    further: dict[str, dict[str, list[Row]]] = field(default_factory=dict)

    @property
    def by_prompt(self) -> dict[str, Row]:
        """One row per prompt: its log-likelihood is the same in all."""
        return next(iter(self.by_temperature.values()), {})

    def all_of(self, temperature: str, prompt_id: str) -> list[Row]:
        """Return every response to a prompt at a temperature."""
        first = self.by_temperature.get(temperature, {}).get(prompt_id)
        return [] if first is None else [first, *self.further.get(temperature, {}).get(prompt_id, ())]

    def add(self, row: Row) -> None:
        """Add a response; those to a prompt are added in order."""
        temperature = f"{row['temperature']:g}"
        firsts = self.by_temperature.setdefault(temperature, {})
        if row.get("sample_index"):
            self.further.setdefault(temperature, {}).setdefault(row["prompt_id"], []).append(row)
        else:
            firsts[row["prompt_id"]] = row


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
        found.add(row)
    return found
