"""Metrics of the responses of online steps, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spin.alignment.training.online.labels import StepCounts

_SUMMED = (
    *("prompts", "responses", "tokens", "truncated", "scored", "score_sum", "failed", "without_pair", "unpaired"),
    *("pairs", "logp_sum", "logp_tokens", "updates", "lag"),
)
_TIMED = ("generate", "label", "reference", "update")


def reduced(counts: StepCounts, accelerator: Accelerator) -> dict[str, float]:
    """Return the sums over all processes, and the mean seconds of each part of a step. Every process must call it."""
    values = [float(getattr(counts, name)) for name in _SUMMED]
    values += [counts.seconds.get(name, 0.0) / accelerator.num_processes for name in _TIMED]
    return dict(zip((*_SUMMED, *(f"{name}_seconds" for name in _TIMED)), summed(values, accelerator), strict=True))


def summed(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """Return the sums of some numbers over all processes. Every process must call it."""
    local = torch.tensor(values, dtype=torch.float32, device=accelerator.device)
    total: list[float] = accelerator.reduce(local, reduction="sum").tolist()
    return total


def training_log(total: dict[str, float]) -> dict[str, float]:
    """Return the metrics of the steps since the last log; empty if no response was sampled."""
    if not total["responses"]:
        return {}
    return {
        "score": total["score_sum"] / max(1.0, total["scored"]),
        "pairs_per_prompt": total["pairs"] / total["prompts"],
        "without_pair": total["without_pair"] / total["prompts"],
        "failed_scores": total["failed"],
        "unpaired": total["unpaired"],
        "response_length": total["tokens"] / total["responses"],
        "truncated": total["truncated"] / total["responses"],
        # The mean of -log pi over sampled tokens: the entropy at temperature 1 without truncation, else the cross-entropy.
        **({"entropy": -total["logp_sum"] / total["logp_tokens"]} if total["logp_tokens"] else {}),
        "staleness": total["lag"] / max(1.0, total["updates"]),
        **{f"seconds/{name}": total[f"{name}_seconds"] for name in _TIMED},
    }


def evaluation_log(total: dict[str, float], prefix: str) -> dict[str, float]:
    """Return the mean score, mean length and fraction of truncated responses for held-out prompts."""
    return {
        f"{prefix}_score": total["score_sum"] / max(1.0, total["scored"]),
        f"{prefix}_length": total["tokens"] / max(1.0, total["responses"]),
        f"{prefix}_truncated": total["truncated"] / max(1.0, total["responses"]),
        **({f"{prefix}_failed_scores": total["failed"]} if total["failed"] else {}),
    }
