"""The record of a step that was not finite: its rows, settings and random state, in ``output_dir/failed-step-N``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from spin.alignment.core.errors import InputError, reason_of
from spin.alignment.core.files import atomic_file, read_json, write_json_atomic, write_text_atomic

_NAMED = 3  # rows that the sentence names


@dataclass(frozen=True)
class FailedStep:
    """A step that was stopped.

    Attributes:
        step: its number, from 1; 0 before the first.
        what: what was not finite, and its value.
        kind: ``pairs`` (prompt_ids, {response}_ids, weights, labels, reference) or ``sft`` (input_ids, labels).
        model: folder or name of the model that training started from.
        settings: those that the loss depends on.
        named: whether the saved rows are exactly those that caused it, not all of the step.
    """

    step: int
    what: str
    kind: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    named: bool = False

    @property
    def when(self) -> str:
        """The step in words."""
        return f"at step {self.step}" if self.step else "before the first step"

    def sentence(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
        """Return the error for the user."""
        names = "; ".join(row_name(row) for row in rows[:_NAMED])
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        which = f"{names}{more}" if self.named else f"one of {len(rows)} rows ({names}{more})"
        return (
            f"{self.what} {self.when} for {which}: see `spin replay {folder}` for the first token that is not finite; the last "
            "checkpoint is unchanged; remove the row if it is at fault, else lower the learning rate, or train in float32"
        )


def row_name(row: Mapping[str, Any]) -> str:
    """Return how a row is named: by its prompt id and the data set it was read from, as far as they are known."""
    source = f" of {row['source']}" if row.get("source") else ""
    if row.get("prompt_id"):
        return f"prompt {row['prompt_id']}{source}"
    return f"a row{source} that starts with the ids {list(row.get('prompt_ids', row.get('input_ids', ())))[:8]}"


def write_failed_step(output_dir: Path, step: FailedStep, rows: Sequence[Mapping[str, Any]], process: int) -> Path:
    """Write the record of this process's rows; return the folder, which the processes share."""
    folder = output_dir / f"failed-step-{step.step}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / f"rows-{process}.jsonl", "".join(json.dumps(plain(row)) + "\n" for row in rows))
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    with atomic_file(folder / f"random-state-{process}.pt") as file:
        torch.save(random_state, file)
    write_json_atomic(folder / "step.json", json.loads(json.dumps(asdict(step), default=str)))
    return folder


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with lists for arrays and tensors; JSON then holds NaN and Infinity as Python writes them."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


# What a record must have to be computed again, by kind: columns of every row, and settings.
_NEEDED: dict[str, tuple[set[str], set[str]]] = {
    "pairs": ({"prompt_ids", "chosen_ids", "rejected_ids"}, {"loss_type", "loss_arguments"}),
    "sft": ({"input_ids", "labels"}, set()),
}


def read_failed_step(folder: Path) -> tuple[FailedStep, list[dict[str, Any]]]:
    """Return the record in a folder and the rows of all processes.

    Raises:
        InputError: the folder has no record, or it is damaged.
    """
    if not (folder / "step.json").is_file():
        raise InputError(
            f"{folder} is no record of a failed step: give a folder failed-step-N of a training's output_dir"
        )
    files = sorted(folder.glob("rows-*.jsonl"))
    try:
        step = FailedStep(**read_json(folder / "step.json"))
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        columns, settings = _NEEDED[step.kind]
        lacking = [*(settings - {*step.settings}), *(name for row in rows for name in columns - {*row})]
        problem = f"it lacks {lacking[0]}" if lacking else "" if rows else "it has no rows"
    except (KeyError, TypeError, ValueError) as error:
        problem = reason_of(error)
    if problem:
        raise InputError(
            f"the record in {folder} is damaged ({problem}): run the training again, which writes a new one"
        )
    return step, rows
