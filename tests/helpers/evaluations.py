"""A stored evaluation of a model that was never trained: eval.json and eval.parquet with given scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spin.alignment.core.provenance import Provenance
from spin.alignment.evaluation.responses import average_nats, average_responses, write_responses


def response_rows(temperature: float, scores: Sequence[float | None], nats: Sequence[float], tokens: Sequence[int]):
    """One row per prompt; the response to the first prompt names the temperature in angle brackets."""
    return [
        {
            "prompt_id": f"p{number}",
            "model": "some/model",
            "temperature": temperature,
            "prompt": f"3+{number}",
            "ground_truth": str(3 + number),
            "response": f"<{temperature:g}>" if number == 0 else str(3 + number),
            "token_ids": [5] * 10,
            "finish_reason": "stop",
            "score": score,
            "nats": nats[number],
            "tokens": tokens[number],
        }
        for number, score in enumerate(scores)
    ]


def write_evaluation(
    folder: Path, scores: dict[float, Sequence[float | None]], nats: Sequence[float], tokens: Sequence[int]
) -> None:
    """Write the evaluation of ``scores`` by temperature, with the log-likelihoods of the ground truths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {temperature: response_rows(temperature, some, nats, tokens) for temperature, some in scores.items()}
    write_responses(
        folder / "eval.parquet", [row for part in parts.values() for row in part], Provenance(kind="evaluation")
    )
    first = next(iter(parts.values()))
    result = {
        "metric": "exact_match",
        "n": len(first),
        "skipped": [],
        "temperatures": {f"{temperature:g}": average_responses(part) for temperature, part in parts.items()},
        **average_nats(first),
        "samples": [{"prompt_id": "p0", "responses": {}}],
    }
    (folder / "eval.json").write_text(json.dumps(result))


def share(count: int, right: int) -> list[float]:
    """``right`` ones, then zeros: ``count`` scores."""
    return [1.0] * right + [0.0] * (count - right)
