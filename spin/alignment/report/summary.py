"""``summary.json``: a headline, one row per model with standard errors and 95 % intervals, verdicts, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.evaluation.responses import HeldOutResponses, read_responses, responses_path
from spin.alignment.evaluation.statistics import Z95, proportion
from spin.alignment.pairs.counts import counts_path, read_counts
from spin.alignment.pipeline.stages.base import Model
from spin.alignment.report.headline import headline
from spin.alignment.report.reported_run import ReportedRun
from spin.alignment.report.verdicts import comparisons, of_role, verdicts, win_verdicts
from spin.alignment.report.warnings import warnings
from spin.alignment.report.win_columns import add_win_rates

# The fields of every row; see :class:`Model`. The iteration is null for models outside of the iterations.
IDENTITY = ("model", "role", "iteration")
# Names of the measures of several responses to a prompt; those of the first temperature that has them are shown.
REPEATED = ("pass@", "maj@")


class NoResults(InputError):
    """No stage of the run has produced results yet."""


@dataclass(frozen=True)
class Results:
    """The summary of a run, and the stored responses by name of the model (of those that have any)."""

    summary: dict[str, Any]
    responses: dict[str, HeldOutResponses]
    samples: list[dict[str, Any]]


def summarize(run: ReportedRun) -> Results:
    """Return the summary of a run, its stored responses and, for a few prompts, those of the first and of the last model.

    Raises:
        NoResults: the run has no results yet.
        InputError: a file of its results is damaged.
    """
    models = run.models
    evaluations = {model.name: _optional(model.folder / "eval.json") for model in models}
    rows = [checked_row(model, evaluations[model.name], run) for model in models]
    rows = [row for row in rows if len(row) > len(IDENTITY)]
    if not rows:
        raise NoResults(f"{run.folder} has no results yet: finish a stage with `spin run` first")
    paths = {model.name: responses_path(model.folder / "eval.json") for model in models if evaluations[model.name]}
    responses = {name: read_responses(path) for name, path in paths.items() if path.exists()}
    for row in rows:
        for role in ("start", "control"):
            other = of_role(rows, role)
            if other is None or other is row or row["role"] == "start":
                continue
            if found := comparisons(row, other, responses):
                row[f"against_{role}"] = {key: comparison.as_row() for key, comparison in found.items()}
    add_win_rates(rows, responses)
    stopped = run.manifest.stopped if run.manifest is not None else None
    summary = {
        "headline": headline(rows, responses, stopped),
        **({"stopped": stopped} if stopped else {}),
        "rows": rows,
        "verdicts": verdicts(rows, responses) + win_verdicts(rows),
        "warnings": warnings(rows, run.drops_identical)
        + [without_responses(name, path) for name, path in paths.items() if not path.exists()],
    }
    shown = [model.name for model in models if model.role != "control" and evaluations[model.name]]
    return Results(
        summary, responses, before_and_after([(evaluations[name], name, responses.get(name)) for name in shown])
    )


def _optional(path: Path, read: Callable[[Path], Any] = read_json) -> dict[str, Any]:
    try:
        found = read(path) if path.exists() else {}
    except InputError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: `spin run` with the configuration of this run makes it again")
    return found


def metrics_of(model: Model) -> dict[str, Any]:
    """Return the metrics of a model's training; the shell scripts leave them in the model's folder. Empty if there are none."""
    return _optional(model.folder / "metrics.json") or _optional(model.folder / "checkpoint" / "metrics.json")


def checked_row(model: Model, evaluation: dict[str, Any], run: ReportedRun) -> dict[str, Any]:
    """Return :func:`model_row`.

    Raises:
        InputError: a file of the model's results lacks what its program writes.
    """
    try:
        return model_row(model, evaluation, run.split)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"the results of {model.name} in {model.folder} are incomplete or of another version ({error}): remove eval.json "
            "there and run `spin run` again"
        ) from error


def model_row(model: Model, evaluation: dict[str, Any], split: str) -> dict[str, Any]:
    """Return everything known about one model from the files that exist; only :data:`IDENTITY` if there are none.

    ``split`` is the split of the pairs next to the model.
    """
    row: dict[str, Any] = dict(zip(IDENTITY, (model.name, model.role, model.iteration), strict=True))
    row |= evaluation_row(evaluation)
    row |= {"folder": model.folder.name} if evaluation else {}
    metrics = metrics_of(model)
    if metrics:
        final = metrics.get("final", {})
        row |= {"first_loss": metrics.get("first_loss"), "train_seconds": metrics.get("seconds")}
        names = {
            "reward_accuracy": "rewards/accuracies",
            "margin": "rewards/margins",
            "chosen_drift": "drift/chosen",
            "chosen_drift_per_token": "drift/chosen_per_token",
            "rejected_drift": "drift/rejected",
            "chosen_logp": "logps/chosen",
            "rejected_logp": "logps/rejected",
        }
        # A policy that is its own reference (online training with ref_update_freq 1) has rewards of exactly 0: nothing to show.
        is_own_reference = final.get("rewards/margins") == 0 == final.get("rewards/accuracies")
        for key, logged in names.items():
            if not (is_own_reference and logged.startswith(("rewards/", "drift/"))):
                row |= logged_estimate(key, final, logged)
    # The pairs next to a policy were generated by its opponent, so these rates describe its training data.
    counts = _optional(counts_path(model.folder / "pairs", split), read_counts)
    if counts and counts["rows"]:
        row |= {"pairs": counts["written"], "generated_rows": counts["rows"]}
        row |= proportion(counts["identical"], counts["rows"]).as_row("identical_rate")
        row |= proportion(counts["truncated"], counts["rows"]).as_row("generated_truncation_rate")
    return {key: value for key, value in row.items() if value is not None or key in IDENTITY}


def logged_estimate(key: str, logged: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a metric of the last training log as ``key``, with its error over the pairs of that log if it was logged."""
    if name not in logged:
        return {}
    row: dict[str, Any] = {key: logged[name]}
    if (error := logged.get(f"{name}_se")) is not None:
        row |= {f"{key}_se": error, f"{key}_interval": [logged[name] - Z95 * error, logged[name] + Z95 * error]}
    return row


def evaluation_row(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Flatten eval.json: greedy_exact, sampled_exact (T=1), sampled_exact_t05 for T=0.5 and so on, and the other averages; each
    with its standard error (``_se``) and 95 % interval (``_interval``). ``groups`` has the scores of each group of rows, and
    ``parts`` the further numbers of the metric under the same names.
    """
    if not evaluation:
        return {}
    row: dict[str, Any] = {"metric": evaluation["metric"], "n": evaluation["n"], "exact_at": {}}
    row["skipped"] = len(evaluation.get("skipped", ()))
    for temperature, scores in evaluation["temperatures"].items():
        row |= estimate(exact_key(temperature), scores, "exact")
        row["exact_at"][temperature] = scores["exact"]
    if "groups" in evaluation:
        row["groups"] = {name: group_row(averages) for name, averages in evaluation["groups"].items()}
    if parts := part_rows(evaluation["temperatures"]):
        row["parts"] = parts
    shown = evaluation["temperatures"].get("1") or next(iter(evaluation["temperatures"].values()))
    for name in ("mean_length", "truncation_rate", "finished_rate", "repetition_rate", "distinct_1", "distinct_2"):
        row |= estimate(name, shown, name)
    row |= estimate("greedy_distinct_2", evaluation["temperatures"].get("0", {}), "distinct_2")
    for scores in evaluation["temperatures"].values():
        row |= {key: value for key, value in scores.items() if key.startswith(REPEATED) and key not in row}
    for name in ("win_rates", "tasks"):
        row |= {name: evaluation[name]} if evaluation.get(name) else {}
    for name, task in evaluation.get("tasks", {}).items():
        row |= estimate(task_key(name), task, "value")
    for name in ("nll", "nll_sequence"):
        row |= estimate(name, evaluation, name)
    return row


def group_row(averages: dict[str, Any]) -> dict[str, Any]:
    """Flatten the averages of one group: its size ``n`` and the scores, named as in :func:`evaluation_row`."""
    row: dict[str, Any] = {"n": averages["n"]}
    for temperature, scores in averages["temperatures"].items():
        row |= estimate(exact_key(temperature), scores, "exact")
    return row


def part_rows(temperatures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the further numbers of the metric by name, each at every temperature, named as in :func:`evaluation_row`."""
    found: dict[str, dict[str, Any]] = {}
    for temperature, scores in temperatures.items():
        for name, values in scores.get("parts", {}).items():
            found[name] = found.get(name, {}) | estimate(exact_key(temperature), values, "value")
    return found


def task_key(name: str) -> str:
    """Return the summary's name of a benchmark."""
    return f"task/{name}"


def estimate(key: str, values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return ``values[name]`` as ``key``, with its standard error and interval if ``values`` has them."""
    return {f"{key}{part}": values[f"{name}{part}"] for part in ("", "_se", "_interval") if f"{name}{part}" in values}


def without_responses(name: str, path: Path) -> str:
    """Return the warning about a model that an older version evaluated."""
    return (
        f"{name} is not compared with other models, because {path} is missing: remove {path.with_suffix('.json')} and run "
        "`spin run` again"
    )


def exact_key(temperature: str) -> str:
    """Return the summary's name of exact match at a temperature given as text: "0", "1" or for example "0.5"."""
    fixed = {"0": "greedy_exact", "1": "sampled_exact"}
    return fixed.get(temperature) or f"sampled_exact_t{temperature.replace('.', '')}"


def before_and_after(
    evaluations: Sequence[tuple[dict[str, Any], str, HeldOutResponses | None]],
) -> list[dict[str, Any]]:
    """Return the shown prompts with the responses of the first and of the last evaluated model (greedy where scored), from the
    stored responses. ``evaluations`` has for each model the content of eval.json, the model's name and its responses.
    """
    scored = [(name, responses) for _, name, responses in evaluations if responses is not None]
    if not scored:
        return []
    shown = [sample["prompt_id"] for sample in next(item for item, _, found in evaluations if found)["samples"]]
    samples = []
    for prompt_id in shown:
        first = scored[0][1].by_prompt[prompt_id]
        sample: dict[str, Any] = {"prompt": first["prompt"], "ground_truth": first["ground_truth"], "responses": {}}
        for name, responses in (scored[0], scored[-1]):
            temperature = "0" if "0" in responses.by_temperature else next(iter(responses.by_temperature))
            row = responses.by_temperature[temperature].get(prompt_id)
            if row is not None:
                sample["responses"][f"{name} (T={temperature})"] = row["response"]
        samples.append(sample)
    return samples
