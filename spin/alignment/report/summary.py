"""``summary.json``: one row per model, verdicts against the SFT start beyond two standard errors, and warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.pipeline.stages import Model, make_stages, models_of
from spin.alignment.pipeline.stages.base import Role

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig

# What every row says of its model; see :class:`Model`. The iteration is null for models outside of the iterations.
IDENTITY = ("model", "role", "iteration")

# Above these a reader is warned; each is explained in docs/pipeline.md.
IDENTICAL_RATE, TRUNCATION_RATE, LENGTH_DRIFT, SATURATED_ACCURACY, CHOSEN_DRIFT_NATS = 0.5, 0.05, 0.2, 0.99, 0.5
# (key, standard error, name, sign of an improvement)
MEASURES = (
    ("sampled_exact", "sampled_exact_se", "exact match at T=1", 1),
    ("greedy_exact", "greedy_exact_se", "greedy exact match", 1),
    ("nll", "nll_se", "NLL of the truth (nats per token)", -1),
)


def summarize(config: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary and, for a few prompts, the responses of the first and the last model.

    Raises:
        InputError: the run has no results yet.
    """
    models = [model for model in models_of(make_stages(config)) if model.is_reported]
    evaluations = {model.name: _optional(model.folder / "eval.json") for model in models}
    rows = [model_row(model, evaluations[model.name], config) for model in models]
    rows = [row for row in rows if len(row) > len(IDENTITY)]
    if not rows:
        raise InputError(f"{config.run_dir} has no results yet: finish a stage with `spin run` first")
    summary = {"rows": rows, "verdicts": verdicts(rows), "warnings": warnings(rows)}
    shown = [evaluations[model.name] | {"model": model.name} for model in models if model.role != "control"]
    return summary, before_and_after(shown)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def model_row(model: Model, evaluation: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return everything known about one model, as far as its files are there; with nothing known, :data:`IDENTITY` alone."""
    row: dict[str, Any] = dict(zip(IDENTITY, (model.name, model.role, model.iteration), strict=True))
    row |= evaluation_row(evaluation)
    metrics = _optional(model.folder / "metrics.json")
    if metrics:
        final = metrics.get("final", {})
        row |= {"first_loss": metrics.get("first_loss"), "train_seconds": metrics.get("seconds")}
        names = {
            "reward_accuracy": "rewards/accuracies",
            "margin": "rewards/margins",
            "chosen_drift": "drift/chosen",
            "chosen_drift_per_token": "drift/chosen_per_token",
            "chosen_logp": "logps/chosen",
            "rejected_logp": "logps/rejected",
        }
        row |= {key: final[logged] for key, logged in names.items() if logged in final}
    counts = _optional(model.folder / "pairs" / f"{config.data.played()[1]}_prefs.counts.json")
    if counts and counts["rows"]:
        row |= {"pairs": counts["written"], "generated_rows": counts["rows"]}
        row["identical_rate"] = counts["identical"] / counts["rows"]
        row["generated_truncation_rate"] = counts["truncated"] / counts["rows"]
    return {key: value for key, value in row.items() if value is not None or key in IDENTITY}


def evaluation_row(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Flatten eval.json: greedy_exact, sampled_exact (T=1), sampled_exact_t05 for T=0.5 and so on, each with ``_se``."""
    if not evaluation:
        return {}
    row: dict[str, Any] = {"metric": evaluation["metric"], "n": evaluation["n"], "exact_at": {}}
    for temperature, scores in evaluation["temperatures"].items():
        key = exact_key(temperature)
        row |= {key: scores["exact"], f"{key}_se": scores["exact_se"]}
        row["exact_at"][temperature] = scores["exact"]
    shown = evaluation["temperatures"].get("1") or next(iter(evaluation["temperatures"].values()))
    row |= {name: shown[name] for name in ("mean_length", "truncation_rate")}
    row |= {name: evaluation[name] for name in ("nll", "nll_sequence", "nll_sequence_se")}
    row["nll_se"] = evaluation["nll_sequence_se"] * evaluation["nll"] / max(evaluation["nll_sequence"], 1e-12)
    return row


def exact_key(temperature: str) -> str:
    """Return the summary's name of exact match at a temperature given as text: "0", "1" or for example "0.5"."""
    fixed = {"0": "greedy_exact", "1": "sampled_exact"}
    return fixed.get(temperature) or f"sampled_exact_t{temperature.replace('.', '')}"


def compare(row: dict[str, Any], other: dict[str, Any], key: str, error: str) -> tuple[float, bool] | None:
    """Return (difference, beyond two standard errors); None when either row lacks the measure.

    The errors are added as if the prompts were different ones, which on the same prompts is cautious.
    """
    if key not in row or key not in other:
        return None
    difference = row[key] - other[key]
    return difference, abs(difference) > 2 * math.hypot(row.get(error, 0.0), other.get(error, 0.0))


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say of every model what rose or fell against the SFT start, and how the controls stand to the last iteration."""
    start, control = _of_role(rows, "start"), _of_role(rows, "control")
    lines = [line for row in rows if start and row is not start for line in _verdict(row, start, "the SFT start")]
    for row in rows:
        plain = _of_role([item for item in rows if item["iteration"] == row["iteration"]], "unweighted")
        if plain and row["role"] == "policy":
            lines += _verdict(row, plain, f"SPIN without weights ({plain['model']})")
    last = _of_role([row for row in reversed(rows) if "exact_at" in row], "policy")
    if last and control:
        lines += _verdict(last, control, "continued SFT")
    if last and start and "sampled_exact" in last:
        cooler = {t: value for t, value in start.get("exact_at", {}).items() if 0 < float(t) < 1}
        lines += [
            f"temperature control: the SFT start sampled at T={t} reaches {value:.3f} without any training, {last['model']} "
            f"at T=1 {last['sampled_exact']:.3f}"
            for t, value in cooler.items()
        ]
    return lines


def _of_role(rows: Sequence[dict[str, Any]], role: Role) -> dict[str, Any] | None:
    return next((row for row in rows if row["role"] == role), None)


def _verdict(row: dict[str, Any], other: dict[str, Any], name: str) -> list[str]:
    lines = []
    for key, error, measure, better in MEASURES:
        found = compare(row, other, key, error)
        if found is None:
            continue
        difference, clear = found
        word = ("better" if difference * better > 0 else "worse") if clear else "no clear change"
        lines.append(f"{row['model']} against {name}: {measure} {other[key]:.3f} -> {row[key]:.3f} ({word})")
    return lines


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what a careful reader should know before trusting the table."""
    start = _of_role(rows, "start") or {}
    lines = []
    for row in rows:
        name = row["model"]
        if row.get("chosen_drift", 0.0) < -CHOSEN_DRIFT_NATS:
            lines.append(
                f"{name}: the log-probability of the chosen responses fell by {-row['chosen_drift']:.2f} nats: add nll_weight or "
                "lower the learning rate"
            )
        if row.get("identical_rate", 0.0) > IDENTICAL_RATE:
            lines.append(
                f"{name}: {row['identical_rate']:.0%} of the responses equal the ground truth and teach nothing: set "
                "convert.identical to drop"
            )
        if row.get("reward_accuracy", 0.0) >= SATURATED_ACCURACY:
            lines.append(f"{name}: reward accuracy {row['reward_accuracy']:.3f} is saturated: fewer epochs would do")
        for key, what in (("truncation_rate", "held-out"), ("generated_truncation_rate", "generated")):
            if row.get(key, 0.0) > TRUNCATION_RATE:
                lines.append(f"{name}: {row[key]:.0%} of the {what} responses were cut by max_new_tokens: raise it")
        base = start.get("mean_length")
        if base and "mean_length" in row and abs(row["mean_length"] / base - 1) > LENGTH_DRIFT:
            lines.append(f"{name}: mean length moved from {base:.1f} to {row['mean_length']:.1f} tokens since SFT")
    return lines


def before_and_after(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the shown prompts with the responses of the first and of the last evaluated model (greedy where scored)."""
    scored = [item for item in evaluations if item.get("samples")]
    if not scored:
        return []
    samples = []
    for index, sample in enumerate(scored[0]["samples"]):
        responses = {}
        for item in (scored[0], scored[-1]):
            texts = item["samples"]
            if index < len(texts) and texts[index]["prompt_id"] == sample["prompt_id"]:
                said = texts[index]["responses"]
                temperature = "0" if "0" in said else next(iter(said))
                responses[f"{item['model']} (T={temperature})"] = said[temperature]
        samples.append({"prompt": sample["prompt"], "truth": sample["truth"], "responses": responses})
    return samples
