"""A stored evaluation of a model that was never trained: eval.json and eval.parquet with given scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spin.alignment.core.provenance import Provenance
from spin.alignment.evaluation.averages import average_nats, average_responses
from spin.alignment.evaluation.responses import write_responses
from tests.helpers.runs import tiny_run, write_config

# What a model may say to attack the page: the response to the second prompt.
ATTACK = "</script><script>document.title = 'attacked'</script><img src=x onerror=\"document.title='attacked'\">"


def response_rows(temperature: float, scores: Sequence[float | None], nats: Sequence[float], tokens: Sequence[int]):
    """One row per prompt; the response to the first prompt names the temperature in angle brackets."""
    said = {0: f"<{temperature:g}>", 1: ATTACK}
    return [
        {
            "prompt_id": f"p{number}",
            "model": "some/model",
            "temperature": temperature,
            "prompt": f"3+{number}",
            "ground_truth": str(3 + number),
            "response": said.get(number, str(3 + number)),
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


def write_finished_run(tmp_path: Path) -> Path:
    """Write a run directory with results, but no models: a start, a control and two iterations; return it."""
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", tiny_run(tmp_path, control={"max_steps": 1}))
    run_dir.mkdir()
    (run_dir / "run.yaml").write_text(config.read_text())
    # Right answers of 100, greedy, at T=1 and at T=0.5, and nats per token.
    numbers = {"sft": (50, 30, 45, 0.5), "control": (52, 31, 46, 0.48)}
    numbers |= {"iter0": (50, 40, 45, 0.45), "iter1": (40, 45, 47, 0.44)}
    for name, values in numbers.items():
        (run_dir / name / "pairs").mkdir(parents=True)
        answers = {temperature: share(100, right) for temperature, right in zip((0.0, 1.0, 0.5), values, strict=False)}
        tokens = [4 + number % 7 for number in range(100)]
        nats = [count * values[3] * (1 + (number % 5 - 2) / 100) for number, count in enumerate(tokens)]
        write_evaluation(run_dir / name, answers, nats, tokens)
        if name.startswith("iter"):
            final = {"rewards/accuracies": 0.9, "rewards/margins": 1.5, "drift/chosen": -2.0, "rewards/margins_se": 0.1}
            metrics = {"first_loss": 0.6931, "seconds": 3.0, "final": final}
            (run_dir / name / "metrics.json").write_text(json.dumps(metrics))
            counts = {"rows": 24, "identical": 18, "truncated": 0, "dropped": 18, "written": 6}
            (run_dir / name / "pairs" / "train_prefs.counts.json").write_text(json.dumps(counts))
    return run_dir
