"""Rows of SFT: a prompt and one response, as a preference pair without a rejected side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

if TYPE_CHECKING:
    from datasets import Dataset

RESPONSE = "response"
RESPONSES = (RESPONSE,)
IGNORED = -100  # label of a token that is not predicted, in transformers and TRL


def without_labels(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    """Return ``prompt_ids``, ``response_ids`` and ``response_mask`` of a sequence with labels. The response begins at the first
    label; its tokens that are 0 in the mask are not predicted, such as the later user turns of a conversation. The first token of
    a sequence is never predicted.
    """
    first = next((place for place in range(1, len(ids)) if labels[place] != IGNORED), max(1, len(ids) - 1))
    row = {"prompt_ids": ids[:first], "response_ids": ids[first:]}
    return row | {"response_mask": [int(label != IGNORED) for label in labels[first:]]}


def with_labels(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as TRL has it, ``input_ids`` and ``labels``, with its other columns."""
    if "input_ids" in row:
        return dict(row)
    prompt, response = row["prompt_ids"], row["response_ids"]
    mask = row.get("response_mask") or [1] * len(response)
    labels = [token if counts else IGNORED for token, counts in zip(response, mask, strict=True)]
    origin = {name: row[name] for name in ("prompt_id", "source") if name in row}
    return {"input_ids": [*prompt, *response], "labels": [IGNORED] * len(prompt) + labels, **origin}


def to_sft_rows(rows: Dataset, length_column: str) -> Dataset:
    """Return rows with ``prompt_ids``, ``response_ids`` and their length, by which transformers groups them.

    The rows given have the first two, or ``input_ids`` and ``labels``, of which ``response_mask`` is made too.
    """
    if "labels" in rows.column_names:
        from datasets import Dataset

        rows = Dataset.from_list([without_labels(row["input_ids"], row["labels"]) for row in rows])
    columns = [rows.with_format("arrow")[:][name] for name in ("prompt_ids", "response_ids")]
    lengths = pc.add(*map(pc.list_value_length, columns)).to_numpy().astype(np.int64)
    return rows.add_column(length_column, lengths)
