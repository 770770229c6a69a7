"""Encoding many rows with few calls of the tokenizer.

How a row is encoded is written as a generator, its *steps*: it yields a text and is sent the ids of that text. The steps of many
rows advance together, so that a tokenizer gets their texts as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from spin.alignment.core.errors import InputError

T = TypeVar("T")
Steps = Generator[str, list[int], T]
# Returns for each text its ids, or why it cannot be encoded.
EncodeAll = Callable[[Sequence[str]], Sequence[list[int] | InputError]]


def run_together(rows: Sequence[Steps[T]], encode_all: EncodeAll) -> list[T | InputError]:
    """Run the steps of several rows to their end; return what each returns, or the error that it raises.

    A text that cannot be encoded raises its error inside the steps that asked for it. Equal texts are encoded once.
    """
    results: list[T | InputError | None] = [None] * len(rows)
    answers: dict[int, list[int] | InputError | None] = dict.fromkeys(range(len(rows)))  # None starts a generator
    while answers:
        asked: dict[int, str] = {}
        for number, answer in answers.items():
            steps = rows[number]
            try:
                asked[number] = steps.throw(answer) if isinstance(answer, InputError) else steps.send(answer)  # type: ignore[arg-type]
            except StopIteration as done:
                results[number] = done.value
            except InputError as error:
                results[number] = error
        texts = list(dict.fromkeys(asked.values()))
        ids = dict(zip(texts, encode_all(texts), strict=True)) if texts else {}
        answers = {number: ids[text] for number, text in asked.items()}
    return results  # type: ignore[return-value]


def run_alone(steps: Steps[T], encode_all: EncodeAll) -> T:
    """Run the steps of one row to their end and return what they return.

    Raises:
        InputError: they raise it.
    """
    result = run_together([steps], encode_all)[0]
    if isinstance(result, InputError):
        raise result
    return result
