"""The data of the chat demo: everyday tasks with verifiable instructions, without ground truth; the same rows in every run.

The test split has two groups of rows: ``held-out prompts``, other tasks with the kinds of instructions that are trained, and
``held-out kinds``, kinds that no training row has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.files import write_text_atomic
from spin.alignment.pipeline.demos.everyday_tasks import tasks
from spin.alignment.pipeline.demos.instruction_phrases import HELD_OUT, TRAINED, Phrases, go_together

SEED = 20261128
TRAINING_TASKS, TRAINING_ROWS = 220, 768
HELD_OUT_ROWS, ROWS_OF_EACH_KIND = 240, 8
# The share of the rows with two instructions.
TWO_INSTRUCTIONS = 0.3
PROMPTS, KINDS = "held-out prompts", "held-out kinds"

Task = tuple[str, str]
Row = dict[str, Any]


def write_data(folder: Path) -> str:
    """Write ``train.jsonl`` and ``test.jsonl``; return a sentence that says what they contain."""
    train, test = make_rows()
    for name, rows in (("train", train), ("test", test)):
        write_text_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return (
        f"wrote {len(train)} training prompts with {len(TRAINED)} kinds of instructions, {HELD_OUT_ROWS} held-out prompts, and "
        f"{len(test) - HELD_OUT_ROWS} prompts with {len(HELD_OUT)} other kinds to {folder}"
    )


def make_rows() -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows."""
    generator = random.Random(SEED)
    shuffled = tasks()
    generator.shuffle(shuffled)
    trained, held_out = shuffled[:TRAINING_TASKS], shuffled[TRAINING_TASKS:]
    train = [
        {"prompt_id": f"train-{number:03d}", **row}
        for number, row in enumerate(_rows(generator, trained, TRAINING_ROWS))
    ]
    test = [row | {"group": PROMPTS} for row in _rows(generator, held_out, HELD_OUT_ROWS)]
    test += [row | {"group": KINDS} for row in _rows_of_other_kinds(generator, held_out)]
    return train, [{"prompt_id": f"test-{number:03d}", **row} for number, row in enumerate(test)]


def _rows(generator: random.Random, some: Sequence[Task], count: int) -> list[Row]:
    """Return rows with each task and each trained kind as often as any other, or once more; no prompt occurs twice."""
    kinds, rows, seen = list(TRAINED), list[Row](), set[str]()
    while len(rows) < count:
        task, first = some[len(rows) % len(some)], kinds[len(rows) % len(kinds)]
        others = [kind for kind in kinds if go_together(first, kind)]
        chosen = [first, generator.choice(others)] if generator.random() < TWO_INSTRUCTIONS else [first]
        row = _row(generator, task[1], chosen, TRAINED)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    generator.shuffle(rows)
    return rows


def _rows_of_other_kinds(generator: random.Random, some: Sequence[Task]) -> list[Row]:
    rows = []
    for kind, phrases in HELD_OUT.items():
        suited = [text for genre, text in some if not phrases.genres or genre in phrases.genres]
        picked = generator.sample(suited, min(len(suited), ROWS_OF_EACH_KIND))
        rows += [_row(generator, text, [kind], HELD_OUT) for text in picked]
    return rows


def _row(generator: random.Random, task: str, kinds: Sequence[str], phrases: Mapping[str, Phrases]) -> Row:
    """Return a row without its id: the task, and one sentence for each kind, mostly after it."""
    sentences, instructions = [], []
    for kind in kinds:
        arguments = {name: generator.choice(choices) for name, choices in phrases[kind].arguments.items()}
        shown = {
            name: ", ".join(f'"{item}"' for item in value) if isinstance(value, list) else value
            for name, value in arguments.items()
        }
        sentences.append(generator.choice(phrases[kind].texts).format(**shown))
        instructions.append({"kind": kind, "arguments": arguments})
    parts = [*sentences, task] if generator.random() < 0.15 else [task, *sentences]
    return {"prompt": " ".join(parts), "instructions": instructions}
