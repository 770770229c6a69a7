"""The samples of the page: every held-out response of every model, with each text stored once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spin.alignment.evaluation.responses import HeldOutResponses

# Bytes of texts that a page may contain: it should open at once, and be small enough for a mail.
TEXT_BUDGET = 14_000_000


class Texts:
    """The distinct texts of a page, each with a number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Return the number of a text, which is added if it is new."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
            self.size += len(json.dumps(text, ensure_ascii=False).encode())
        return self._numbers[text]


def all_samples(
    responses: Mapping[str, HeldOutResponses],
    lengths: Mapping[str, Mapping[str, Mapping[str, int]]],
    budget: int = TEXT_BUDGET,
) -> dict[str, Any]:
    """Return all prompts with the responses of all models, in the order of the first model's file.

    ``texts`` has every distinct text; everything else names texts by number. ``prompts`` has (id, prompt, ground truth or null),
    and ``answers[temperature][model]`` one entry per prompt: (response, score, tokens, is truncated), or null without a response.
    ``total`` is the number of prompts: if the texts exceed ``budget`` bytes, only the first prompts are included.
    """
    prompts = {name: row for found in responses.values() for name, row in found.by_prompt.items()}
    temperatures = sorted({t for found in responses.values() for t in found.by_temperature}, key=float)
    texts, shown = Texts(), []
    answers: dict[str, dict[str, list[Any]]] = {t: {} for t in temperatures}
    for name, row in prompts.items():
        truth = row["ground_truth"]
        shown.append([name, texts.number(row["prompt"]), None if truth is None else texts.number(truth)])
        for model, found in responses.items():
            for temperature, rows in found.by_temperature.items():
                answer = _answer(rows.get(name), texts, lengths[model].get(temperature, {}))
                answers[temperature].setdefault(model, []).append(answer)
        if texts.size > budget:
            break
    return {"texts": texts.texts, "prompts": shown, "answers": answers, "total": len(prompts)}


def _answer(row: Mapping[str, Any] | None, texts: Texts, lengths: Mapping[str, int]) -> list[Any] | None:
    if row is None:
        return None
    score = None if row["score"] is None else round(row["score"], 4)
    return [texts.number(row["response"]), score, lengths[row["prompt_id"]], int(row["finish_reason"] == "length")]
