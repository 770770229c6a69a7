"""Curves of the page: the metrics of every training by step, and the lengths of held-out responses as histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spin.alignment.core.parquet import read_batches

# The metrics shown first, in this order, with their titles; others follow under the names that the Trainer logs.
TITLES = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Margin (nats, times beta)",
    "score": "Mean score of sampled responses",
    "drift/chosen": "Chosen drift (nats)",
    "drift/rejected": "Rejected drift (nats)",
    "logps/chosen": "Log-prob of chosen responses (nats)",
    "logps/rejected": "Log-prob of rejected responses (nats)",
    "response_length": "Length of sampled responses (tokens)",
    "without_pair": "Share of prompts without a pair",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
# Errors, the x axis, and the summary that the Trainer logs at the end.
_SKIPPED = ("step", "epoch", "total_flos", "train_loss", "train_runtime")
SFT = "sft:"
BINS = 40


def training_curves(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the logged histories of ``metrics.json`` by name of the model.

    The result has ``titles`` (metric -> title, in the order shown) and ``models`` (model -> metric -> [steps, values]). The
    metrics of SFT have charts of their own, since its loss is another quantity.
    """
    models: dict[str, dict[str, list[list[float]]]] = {}
    for name, content in metrics.items():
        curves: dict[str, list[list[float]]] = {}
        for entry in content.get("history", ()):
            for key, value in entry.items():
                if _is_shown(key, value) and "step" in entry:
                    steps, values = curves.setdefault(key, [[], []])
                    steps.append(entry["step"])
                    values.append(_rounded(value))
        if curves:
            is_sft = "rewards/margins" not in curves
            models[name] = {f"{SFT}{key}": found for key, found in curves.items()} if is_sft else curves
    logged = {key for curves in models.values() for key in curves}
    known = [*TITLES, *(f"{SFT}{key}" for key in TITLES)]
    order = sorted(logged, key=lambda key: (known.index(key) if key in known else len(known), key))
    return {"titles": {key: _title(key) for key in order}, "models": models}


def _title(key: str) -> str:
    name = key.removeprefix(SFT)
    title = TITLES.get(name, name)
    return title if name == key else f"SFT: {title[0].lower()}{title[1:]}"


def _is_shown(key: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and not key.startswith(_SKIPPED) and not key.endswith(("_se", "_per_second"))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def response_lengths(path: Path) -> dict[str, dict[str, int]]:
    """Return the length in tokens, EOS included, of every response in ``eval.parquet``: by temperature, then prompt id."""
    found: dict[str, dict[str, int]] = {}
    for batch in read_batches(path, columns=["prompt_id", "temperature", "token_ids"]):
        lengths = batch.column("token_ids").value_lengths().to_pylist()
        names, temperatures = (batch.column(name).to_pylist() for name in ("prompt_id", "temperature"))
        for name, temperature, length in zip(names, temperatures, lengths, strict=True):
            found.setdefault(f"{temperature:g}", {})[name] = length
    return found


def length_histograms(lengths: dict[str, dict[str, dict[str, int]]], temperatures: Sequence[str]) -> dict[str, Any]:
    """Return histograms of :func:`response_lengths` by model: ``{temperature: {"edges": [...], "models": {name: shares}}}``.

    All models share the bins of a temperature; a share is that of the model's responses.
    """
    result = {}
    for temperature in temperatures:
        values = {name: list(found[temperature].values()) for name, found in lengths.items() if temperature in found}
        longest = max((max(some) for some in values.values() if some), default=0)
        width = max(1, math.ceil((longest + 1) / BINS))
        edges = np.arange(0, longest + 1 + width, width)
        shares = {
            name: [_rounded(count / len(some)) for count in np.histogram(some, edges)[0]]
            for name, some in values.items()
            if some
        }
        result[temperature] = {"edges": edges.tolist(), "models": shares}
    return result
