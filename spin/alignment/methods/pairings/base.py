"""What every pairing receives and returns, and what those that compare labels share. Pure functions: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from spin.alignment.core.errors import InputError
from spin.alignment.methods.labels import SCORE, Label, as_labels

Row = dict[str, Any]

# Columns of a pair whose chosen side is one of the model's own responses, besides the generated ones.
OWN_CHOSEN = ("chosen_token_ids", "chosen_finish_reason", *SCORE.columns)


@dataclass(frozen=True)
class Pairing:
    """Turns the generated rows of ONE prompt into preference rows (none on a tie), and says what it needs and writes.

    A plain function is a pairing too, with the defaults below: its pairs have the columns of the rows, and each compares with
    the ground truth.

    Attributes:
        pair: the function.
        needs: label columns of the rows that it reads: a scorer must have written them.
        labels: labels that its pairs have beyond the generated columns.
        min_samples: responses to a prompt that it needs.
        even: it takes two responses a row, so their number must be even.
        prefers: one response of a pair is preferred to the other; without, each is trained on by itself.
        relative: one of its labels that is a score minus the soft-mean of its group; online training sets the group and b.
    """

    pair: Callable[[Sequence[Row]], list[Row]]
    needs: tuple[str, ...] = ()
    labels: tuple[Label | str, ...] = ()
    min_samples: int = 1
    even: bool = False
    prefers: bool = True
    relative: Label | None = None
    keeps_rows: ClassVar[bool] = False

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        return self.pair(rows)

    @property
    def name(self) -> str:
        """The name of its function, for errors."""
        return getattr(self.pair, "__name__", "of these rows")

    @property
    def adds(self) -> tuple[str, ...]:
        """Columns its pairs have beyond the generated ones."""
        return tuple(column for label in self.own_labels for column in label.columns)

    @property
    def own_labels(self) -> tuple[Label, ...]:
        return as_labels(self.labels)

    @property
    def reads_ground_truth(self) -> bool:
        """Whether the ground truth must have a score."""
        return False

    @property
    def needs_ground_truth(self) -> bool:
        """Whether it compares with the ground truth, so that every prompt must have one."""
        return True

    def writes(self, label: Label) -> bool:
        """Return whether its pairs have a label."""
        return label.columns[0] in self.adds

    def unpaired(self, rows: Sequence[Row]) -> int:
        """Return how many responses to one prompt are left over where pairs take two each."""
        return 0


@dataclass(frozen=True)
class EveryRow(Pairing):
    """A pairing whose pairs are the rows themselves: all of them, unchanged and in order.

    Gathering reads ``keeps_rows`` and then moves whole record batches, never a Python row.
    """

    keeps_rows: ClassVar[bool] = True


@dataclass(frozen=True)
class Labelled(Pairing):
    """A pairing that compares the scores of responses, which :func:`label_rows` has put on the rows.

    ``pair`` sees only rows that the scorer did not fail on, by sample index, ``min_samples`` or more.
    """

    needs: tuple[str, ...] = ("rejected_score",)
    min_samples: int = 2

    @property
    def adds(self) -> tuple[str, ...]:
        return (*OWN_CHOSEN, *super().adds)

    @property
    def reads_ground_truth(self) -> bool:
        return "chosen_score" in self.needs

    @property
    def needs_ground_truth(self) -> bool:
        return self.reads_ground_truth

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Return the pairs of one prompt; none where too few responses have a score.

        Raises:
            InputError: a row lacks a label, or the labels of a prompt contradict each other.
        """
        for row in rows:
            missing = [name for name in self.needs if name not in row]
            if missing:
                raise InputError(
                    f"prompt {row['prompt_id']} has no {missing[0]}: score the responses with a scorer first"
                )
        known = sorted(
            (row for row in rows if row["rejected_score"] is not None), key=lambda row: int(row["sample_index"])
        )
        return self.pair(known) if len(known) >= self.min_samples else []

    def unpaired(self, rows: Sequence[Row]) -> int:
        """Return how many scored responses to one prompt (0 or 1) are left over where pairs take two each."""
        return sum(row["rejected_score"] is not None for row in rows) % 2 if self.even else 0


def check_num_samples(name: str, pairing: Pairing, num_samples: int) -> None:
    """Check that a pairing can work with this many responses to a prompt.

    Raises:
        InputError: they are too few, or odd where pairs take two each.
    """
    if num_samples < pairing.min_samples:
        raise InputError(
            f"pairing {name} needs {pairing.min_samples} responses to a prompt or more, but there "
            f"{'is 1' if num_samples == 1 else f'are {num_samples}'}: sample with --num_samples {pairing.min_samples} or more"
        )
    if pairing.even and num_samples % 2:
        raise InputError(
            f"pairing {name} takes two responses a row, but there are {num_samples} to a prompt: sample with "
            f"--num_samples {num_samples + 1}"
        )


def label_rows(
    rows: Sequence[Row],
    scores: Sequence[float | None],
    win_probs: Sequence[Sequence[float]] | None = None,
    reference_score: float | None = None,
) -> None:
    """Put a scorer's labels on the rows of one prompt, in place: ``rejected_score``, ``chosen_score`` (that of the ground
    truth) and ``win_probs`` (where the scorer compares responses). ``scores[i]`` is that of sample ``i``; None: it failed.

    Raises:
        InputError: the scorer returned another number of scores, a value that is not finite, or win probabilities that
            contradict each other; the prompt is named.
    """
    prompt_id = rows[0]["prompt_id"] if rows else ""
    if len(scores) != len(rows):
        raise InputError(
            f"the scorer gave prompt {prompt_id} {len(scores)} scores for {len(rows)} responses: correct the scorer"
        )
    for sample, score in enumerate((*scores, reference_score)):
        if score is not None and not math.isfinite(score):
            which = "the ground truth" if sample == len(scores) else f"sample {sample}"
            raise InputError(f"the scorer gave prompt {prompt_id}, {which}, the score {score}: it must be finite")
    if win_probs is not None:
        check_win_probs(win_probs, len(rows), prompt_id)
    for row in rows:
        sample = int(row["sample_index"])
        score = scores[sample]
        row["rejected_score"] = None if score is None else float(score)
        row["chosen_score"] = None if reference_score is None else float(reference_score)
        row["win_probs"] = None if win_probs is None else [float(value) for value in win_probs[sample]]


def check_win_probs(win_probs: Sequence[Sequence[float]], size: int, prompt_id: str) -> None:
    """Check a win matrix: ``size`` by ``size``, in [0, 1], ``P_ik + P_ki = 1``.

    Raises:
        InputError: naming the prompt and the two samples.
    """
    if len(win_probs) != size or any(len(line) != size for line in win_probs):
        shape = f"{len(win_probs)} x {'/'.join(map(str, sorted({len(line) for line in win_probs})))}"
        raise InputError(
            f"the win probabilities of prompt {prompt_id} are {shape}, not {size} x {size}: correct the scorer"
        )
    for i, line in enumerate(win_probs):
        for k, value in enumerate(line):
            if not 0 <= value <= 1:
                raise InputError(
                    f"the win probability of samples {i} and {k} of prompt {prompt_id} is {value}: it must lie between 0 and 1"
                )
            if abs(value + win_probs[k][i] - 1) > 1e-6:
                raise InputError(
                    f"the win probabilities of samples {i} and {k} of prompt {prompt_id} are {value} and {win_probs[k][i]}: "
                    "they must add up to 1"
                )


def own_pair(better: Row, worse: Row) -> Row:
    """Return the pair of two own responses to one prompt; its sample index is that of the rejected side."""
    return {name: value for name, value in worse.items() if name != "win_probs"} | {
        "chosen": better["rejected"],
        "chosen_token_ids": better["rejected_token_ids"],
        "chosen_finish_reason": better["rejected_finish_reason"],
        "chosen_score": better["rejected_score"],
    }


def best(rows: Sequence[Row]) -> Row:
    """Return the row of the highest score; of equal ones the first."""
    return max(rows, key=lambda row: float(row["rejected_score"]))


def check_ground_truth(row: Row, pairing: str) -> None:
    """Refuse a prompt without ground truth.

    Raises:
        InputError: naming the prompt.
    """
    if row["chosen"] is None:
        raise missing_ground_truth(row["prompt_id"], pairing)


def missing_ground_truth(prompt_id: str, pairing: str) -> InputError:
    """Return the refusal of a prompt whose ground truth is missing."""
    return InputError(
        f"prompt {prompt_id} has no ground truth, which pairing {pairing} compares with: add its answer and generate again, "
        "or choose a pairing of own responses such as best_vs_worst"
    )
