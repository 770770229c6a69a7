"""Completes the model cards of a run with its results: the held-out scores with their intervals, and the comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.alignment.core.cards import markdown_table
from spin.alignment.models.card import complete_card
from spin.alignment.report.page import scored_on
from spin.alignment.report.summary import exact_key
from spin.alignment.report.table import CAPTION, cells

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from spin.alignment.report.collected import Collected

# Models whose scores stand beside those of the card's model.
_COMPARED = ("start", "control")


def complete_cards(collected: Collected) -> None:
    """Add the results of a run to the card of every model that it has trained and scored."""
    summary = collected.summary
    rows = {row["model"]: row for row in summary["rows"]}
    for model in collected.run.models:
        row = rows.get(model.name)
        if row is not None and "exact_at" in row:
            text = _results_text(summary, model.name)
            complete_card(model.folder / "checkpoint", _eval_results(row), text)


def _results_text(summary: dict[str, Any], name: str) -> str:
    shown = [row["model"] for row in summary["rows"] if row["model"] == name or row["role"] in _COMPARED]
    headings, table = cells(summary)
    lines = [line for line in summary["verdicts"] if line.startswith(f"{name} against ")]
    parts = [
        f"This model is `{name}` of its run. Scored by {scored_on(summary)}.",
        markdown_table(headings, [row for row in table if row[0] in shown]),
        CAPTION + ".",
        "\n".join(f"- {line}" for line in lines),
    ]
    return "\n\n".join(part for part in parts if part)


def _eval_results(row: dict[str, Any]) -> list[EvalResult]:
    """Return the scores of a row of the summary as entries of a ``model-index``."""
    from huggingface_hub import EvalResult

    metric = row["metric"]
    values = [(metric, f"{metric} at temperature {t}", row[exact_key(t)]) for t in row["exact_at"]]
    if "nll" in row:
        values.append(("nll", "NLL of the ground truth (nats per token)", row["nll"]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{row['n']} held-out prompts",
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, name, value in values
    ]
