"""The tables and plots of docs/evidence.md, from the committed results. Called by ``scripts/make_docs.py`` as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.measures import (
    COLUMNS,
    Column,
    Difference,
    Trained,
    best_of,
    cell,
    difference,
    estimate,
    win_rates,
)
from benchmarks.evidence.plan import REPOSITORY, STUDIES
from benchmarks.evidence.results import result_path
from spin.alignment.core.console import say
from spin.alignment.core.errors import lookup
from spin.alignment.core.files import atomic_file, read_json, write_text_atomic
from spin.alignment.evaluation.statistics import holm

IMAGES = REPOSITORY / "docs" / "images"
START = Trained("base", "start", "start")
# The model that the arms of a study start from, and its control.
REFERENCES = {"base": START, "a": START, "b": Trained("b", "sft", "final"), "c": Trained("c", "sft", "final")}
CONTROLS = {
    "a": Trained("a", "online_dpo", "accepted_sft"),
    "b": Trained("b", "continued_sft", "final"),
    "c": Trained("c", "continued_sft", "final"),
}
# The measures that the claims of a study are about (docs/evidence.md).
MAIN = {
    "a": ("prompt_strict", "instruction_strict"),
    "b": ("nll", "prompt_strict", "chrf"),
    "c": ("gsm8k",),
}


def models_of(study: str) -> list[Trained]:
    """Return the models of a study that have a result, the one they start from first."""
    own = [Trained(study, arm, model) for arm, item in STUDIES[study].arms.items() for model in item.models]
    every = dict.fromkeys([REFERENCES[study], *own])
    return [model for model in every if any(model.seeds(column.benchmark) for column in COLUMNS)]


def evidence_tables(study: str) -> str:
    """Return the plot and tables of a study in Markdown: numbers, and paired differences from the start and the control."""
    lookup(STUDIES, study, "study")
    models = models_of(study)
    columns = [column for column in COLUMNS if any(model.seeds(column.benchmark) for model in models)]
    if not columns:
        return "No result yet."
    parts = [_numbers(models, columns), *_sampled(models), *_trainings(models)]
    image = IMAGES / f"evidence-{study}.png"
    if image.is_file():
        parts.insert(0, f"![{STUDIES[study].title}](images/{image.name})")
    if study in CONTROLS and len(models) > 1:
        parts.append(_differences(study, models))
        parts += _win_rates(study, models) if "chrf" in MAIN[study] else []
    return "\n\n".join(parts)


def _numbers(models: Sequence[Trained], columns: Sequence[Column]) -> str:
    headings = ["model", "seeds", *(column.measure.name for column in columns), "length", "truncated", "distinct-2"]
    lines = []
    for model in models:
        cells = [
            cell([estimate(model.values(column, seed)) for seed in model.seeds(column.benchmark)], column.form)
            for column in columns
        ]
        seeds = max(len(model.seeds(column.benchmark)) for column in columns)
        lines.append([model.label, str(seeds), *cells, *_lengths(model)])
    caption = (
        "± half of the 95 % interval over prompts; with several seeds the mean, and in brackets the lowest and highest seed. "
        "NLL: nats per token of held-out ground truths, lower is better. Length (tokens), truncated, distinct-2: greedy "
        "responses to IFEval."
    )
    return f"{_table(headings, lines)}\n\n{caption}"


def _lengths(model: Trained) -> list[str]:
    found = [model.result("ifeval", seed)[0]["temperatures"]["0"] for seed in model.seeds("ifeval")]
    if not found:
        return ["–"] * 3
    forms = {"mean_length": "{:.0f}", "truncation_rate": "{:.1%}", "distinct_2": "{:.3f}"}
    return [form.format(sum(item[name] for item in found) / len(found)) for name, form in forms.items()]


def _trainings(models: Sequence[Trained]) -> list[str]:
    """Return a table of the last training log of each model, if any was trained on stored pairs.

    Online (which logs a score) the reference is the policy itself, so that margins and drift say nothing.
    """
    logged = ("rewards/accuracies", "rewards/margins", "drift/chosen", "logps/chosen", "logps/rejected")
    lines = []
    for model in models:
        for seed in STUDIES[model.study].arms[model.arm].seeds:
            path = result_path(model.study, model.arm, seed, model.model, "training")
            final = read_json(path).get("final", {}) if path.is_file() else {}
            if "rewards/margins" in final and "score" not in final:
                lines.append(
                    [model.label, str(seed), *(f"{final[name]:.2f}" if name in final else "–" for name in logged)]
                )
    headings = [
        "last training log",
        "seed",
        "reward accuracy",
        "margin",
        "chosen drift",
        "log-prob chosen",
        "log-prob rejected",
    ]
    return (
        [f"{_table(headings, lines)}\n\nDrift and log-probs in nats per response, the margin times beta."]
        if lines
        else []
    )


def _sampled(models: Sequence[Trained]) -> list[str]:
    """Return a table of several samples for each prompt, if any model has them."""
    lines = []
    candidates = [*models, Trained("base", "sampling", "start")] if START in models else models
    for model in candidates:
        for benchmark, part, name in (("ifeval_sampled", "prompt_strict", "IFEval"), ("gsm8k_sampled", "", "GSM8K")):
            found = best_of(model, benchmark, part)
            if found is not None:
                lines.append([model.label, name, *(cell([item], "{:.3f}") for item in found)])
    headings = ["model", "benchmark", "one sample at T=1", "any of the samples right"]
    return [_table(headings, lines)] if lines else []


def compared_models(study: str, models: Sequence[Trained]) -> list[tuple[Trained, Trained]]:
    """Return every model with the start of the study, then with its control."""
    others = dict.fromkeys((REFERENCES[study], CONTROLS[study]))
    return [(model, other) for model in models for other in others if model not in (other, REFERENCES[study])]


def _win_rates(study: str, models: Sequence[Trained]) -> list[str]:
    """Return a table of win rates, if any are known."""
    (column,) = (column for column in COLUMNS if column.measure.key == "chrf")
    lines = [
        [model.label, other.label, cell(rates, "{:.3f}")]
        for model, other in compared_models(study, models)
        if (rates := win_rates(model, other, column))
    ]
    return [_table(["model", "against", "win rate in chrF to the ground truth"], lines)] if lines else []


def _differences(study: str, models: Sequence[Trained]) -> str:
    rows: list[tuple[Trained, Trained, Column, Difference]] = []
    for model, other in compared_models(study, models):
        for column in COLUMNS:
            found = difference(model, other, column) if column.measure.key in MAIN[study] else None
            if found is not None:
                rows.append((model, other, column, found))
    adjusted = holm([found.p_value for *_, found in rows])
    lines = [
        [model.label, other.label, column.measure.name, *_difference(found, column), f"{p:.3f}"]
        for (model, other, column, found), p in zip(rows, adjusted, strict=True)
    ]
    headings = ["model", "against", "measure", "difference", "each seed", "p", "verdict", f"p, Holm over {len(rows)}"]
    return _table(headings, lines) + (
        "\n\nOn the same prompts, with 95 % intervals. One seed: McNemar's exact test, or a paired ratio test. Several seeds: "
        "prompts and seeds resampled."
    )


def _difference(found: Difference, column: Column) -> list[str]:
    low, high = found.mean.interval or (found.mean.value, found.mean.value)
    better = (found.mean.value < 0) == column.lower_is_better
    word = ("better" if better else "worse") if found.p_value < 0.05 else "no clear change"
    return [
        f"{found.mean.value:+.3f} ({low:+.3f} to {high:+.3f})",
        ", ".join(f"{item.difference:+.3f}" for item in found.seeds),
        f"{found.p_value:.3f}",
        word,
    ]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *lines])


def write_tables() -> None:
    """Write the plot of every study that has results, and the tables of docs/evidence.md."""
    from benchmarks.evidence.plots import study_plot
    from scripts.make_docs import up_to_date

    page = REPOSITORY / "docs" / "evidence.md"
    for study in STUDIES:
        models = models_of(study)
        if len(models) > 1 and study != "base":
            path = IMAGES / f"evidence-{study}.png"
            with atomic_file(path) as file:
                file.write(study_plot(study, models))
            say(f"wrote {_shown(path)}")
    write_text_atomic(page, up_to_date(page.read_text(encoding="utf-8")))
    say(f"wrote {_shown(page)}")


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))
