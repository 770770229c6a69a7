"""Benchmarks of lm-evaluation-harness (extra ``eval``), run on the model of an evaluation in this process or by vLLM."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.evaluation.harness_models import check_engine, free_memory, opened_model
from spin.alignment.evaluation.statistics import Z95

# (task, examples shown, metric). The leaderboard's numbers of shots: https://huggingface.co/docs/leaderboards/open_llm_leaderboard
# (version 1, archived). GSM8K and IFEval are as their authors and the harness define them.
PRESETS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "open_llm_leaderboard": (
        ("arc_challenge", 25, "acc_norm"),
        ("hellaswag", 10, "acc_norm"),
        ("truthfulqa_mc2", 0, "acc"),
        ("mmlu", 5, "acc"),
        ("winogrande", 5, "acc"),
        ("gsm8k", 5, "exact_match,strict-match"),
    ),
    "gsm8k": (("gsm8k", 5, "exact_match,strict-match"),),
    "ifeval": (("ifeval", 0, "prompt_level_strict_acc"),),
}
# Shown first for a task that no preset names, if it has one of them; else its first metric.
_PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc")


@dataclass(frozen=True)
class Task:
    """A task or group of tasks of the harness.

    Attributes:
        shots: examples shown; None: as many as the task says.
        metric: the number that stands for it in the report, with its filter after a comma; empty: chosen by :func:`main_metric`.
    """

    name: str
    shots: int | None
    metric: str = ""


def find_tasks(config: EvaluateConfig) -> list[Task]:
    """Return the tasks of the settings, presets resolved, after a look whether the harness has them.

    Raises:
        InputError: the harness is not installed or cannot be used with the backend, or there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks needs the package lm-eval: pip install 'selfplay-spin[eval]', or remove the tasks")
    if config.task_dir is not None and not any(Path(config.task_dir).rglob("*.y*ml")):
        raise InputError(f"task_dir {config.task_dir} has no YAML file: give a folder with tasks of the harness")
    check_engine(config.backend)
    tasks = parse_tasks(config.tasks)
    manager = task_manager(config.task_dir)
    known = {*manager.all_tasks}
    for task in tasks:
        if task.name not in known:
            raise InputError(
                f"tasks names {task.name}, which lm-evaluation-harness does not have: `lm-eval ls tasks` lists its tasks, and "
                "task_dir may add some"
            )
    return tasks


def parse_tasks(names: Sequence[str]) -> list[Task]:
    """Return tasks from texts such as ``arc_challenge=25``, a name alone, or the name of a preset.

    Raises:
        InputError: the number after ``=`` is none, or a task is named twice.
    """
    found: dict[str, Task] = {}
    for text in names:
        name, sign, shots = (part.strip() for part in text.partition("="))
        if sign and not (shots.isascii() and shots.isdigit()):
            raise InputError(f"tasks has {text!r}: write TASK=SHOTS with a whole number, as in arc_challenge=25")
        chosen = [Task(*item) for item in PRESETS[name]] if name in PRESETS and not sign else []
        for task in chosen or [Task(name, int(shots) if sign else None)]:
            if task.name in found:
                raise InputError(f"tasks has {task.name} twice, alone or in a preset: name it once")
            found[task.name] = task
    return list(found.values())


@functools.cache
def task_manager(task_dir: str | None) -> Any:
    """Return the harness's index of tasks, with those of a folder; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_dir)


def run_tasks(config: EvaluateConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Run tasks; return for each ``value`` of its main metric with ``value_se`` and ``value_interval``, the name of the
    ``metric``, ``shots``, the number of documents ``n``, and ``all`` metrics as the harness gives them.

    Raises:
        InputError: the data of a task cannot be loaded.
    """
    with opened_model(config) as model:
        found = {task.name: _run_task(config, model, task) for task in tasks}
    del model  # its memory is needed for generation
    free_memory()
    return found


def _run_task(config: EvaluateConfig, model: Any, task: Task) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    say_error(f"task {task.name}")
    try:
        results = simple_evaluate(
            model=model,
            tasks=[task.name],
            num_fewshot=task.shots,
            limit=config.task_limit or None,
            bootstrap_iters=1000,  # only for metrics without a formula for the error
            task_manager=task_manager(config.task_dir),
            log_samples=False,
            apply_chat_template=config.task_chat_template,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=1234,  # the harness's own: which examples are shown is part of a benchmark
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"task {task.name} could not be run ({type(error).__name__}: {reason}): its data is loaded from the Hub unless "
            "its YAML names local files"
        ) from error
    return task_result(task, results)


def task_result(task: Task, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what :func:`run_tasks` does for one task, from the harness's results."""
    numbers: Mapping[str, Any] = results["results"][task.name]
    values = {
        plain_name(key): float(value)
        for key, value in numbers.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    errors = {
        plain_name(key.replace("_stderr", "")): float(value)
        for key, value in numbers.items()
        if isinstance(value, int | float) and "," in key and "_stderr" in key
    }
    if not values:
        raise ValueError(f"the harness gave no number for {task.name}: {dict(numbers)}")
    metric = task.metric if task.metric in values else main_metric(values)
    found: dict[str, Any] = {"value": values[metric], "metric": metric, "shots": _shots(task, results)}
    if (error := errors.get(metric)) is not None and math.isfinite(error):
        low, high = values[metric] - Z95 * error, values[metric] + Z95 * error
        found |= {"value_se": error, "value_interval": [low, high]}
    counts = results.get("n-samples", {})
    total = sum(int(item["effective"]) for item in counts.values())
    return found | ({"n": total} if total else {}) | {"all": values}


def plain_name(key: str) -> str:
    """Return the harness's name of a metric without the filter ``none``: ``acc,none`` is ``acc``."""
    return key.removesuffix(",none")


def main_metric(values: Mapping[str, float]) -> str:
    """Return the metric that stands for a task that no preset describes."""
    named = (name for wanted in _PREFERRED for name in values if name.partition(",")[0] == wanted)
    return next(named, next(iter(values)))


def _shots(task: Task, results: Mapping[str, Any]) -> int:
    """Return the examples shown; of a group, those of its tasks, which have the same number."""
    if task.shots is not None:
        return task.shots
    shots = results.get("n-shot", {})
    return int(shots.get(task.name, next(iter(shots.values()), 0)))
