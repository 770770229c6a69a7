"""The interface of pairings, and what those that compare labels share. Pure functions: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from spin.alignment.core.errors import InputError
from spin.alignment.methods.labels import SCORE, Label, as_labels

Row = dict[str, Any]

# Columns that a pair has beyond the generated ones if its chosen side is one of the model's own responses.
OWN_CHOSEN = ("chosen_token_ids", "chosen_finish_reason", *SCORE.columns)


@dataclass(frozen=True)
class Pairing:
    """Turns the generated rows of ONE prompt into preference rows (none on a tie), and declares what it needs and writes.

    A plain function is a pairing with the defaults below: its pairs have the columns of the rows, and each compares with the
    ground truth.

    Attributes:
        pair: the function.
        needs: label columns that it reads from the rows; a scorer must have written them.
        labels: labels that it adds to its pairs.
        min_samples: minimum number of responses to a prompt.
        even: whether it uses each response once, two per row, so that their number must be even.
        prefers: whether one response of a pair is preferred; otherwise each is trained on separately.
        relative: a label that is a score minus the soft mean of its group; online training chooses the group and b.
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
        """The name of its function, for error messages."""
        return getattr(self.pair, "__name__", "of these rows")

    @property
    def adds(self) -> tuple[str, ...]:
        """Columns that it adds to the generated ones."""
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

    @property
    def counts_unpaired(self) -> bool:
        """Whether responses with a score can be left over, so that they are counted."""
        return self.even

    def unpaired(self, rows: Sequence[Row]) -> int:
        """Return the number of scored responses to one prompt that are left over."""
        return 0

    def for_baseline(self, baseline: str) -> Pairing:
        """Return this pairing for labels that online training makes relative to the ``prompt`` or the ``batch``."""
        return self


@dataclass(frozen=True)
class EveryRow(Pairing):
    """A pairing whose pairs are the rows themselves: all of them, unchanged and in order.

    With ``keeps_rows`` set, gathering copies record batches without converting rows to Python.
    """

    keeps_rows: ClassVar[bool] = True


@dataclass(frozen=True)
class Labelled(Pairing):
    """A pairing that compares the scores of responses, as added to the rows by :func:`label_rows`.

    ``pair`` receives only rows that the scorer did not fail on, sorted by sample index, and at least ``min_samples`` of them.
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
        """Return the pairs of one prompt; none if too few responses have a score.

        Raises:
            InputError: a row has no label, or the labels of a prompt contradict each other.
        """
        known = self.known(rows)
        return self.pair(known) if len(known) >= self.min_samples else []

    def known(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that the scorer did not fail on, by sample index.

        Raises:
            InputError: a row has no label.
        """
        for row in rows:
            missing = [name for name in self.needs if name not in row]
            if missing:
                raise InputError(
                    f"prompt {row['prompt_id']} has no {missing[0]}: score the responses with a scorer first"
                )
        return sorted(
            (row for row in rows if row["rejected_score"] is not None), key=lambda row: int(row["sample_index"])
        )

    def unpaired(self, rows: Sequence[Row]) -> int:
        """Return the number of scored responses to one prompt (0 or 1) that are left over when each row uses two."""
        return sum(row["rejected_score"] is not None for row in rows) % 2 if self.even else 0


def check_num_samples(name: str, pairing: Pairing, num_samples: int) -> None:
    """Check that a pairing supports this number of responses per prompt.

    Raises:
        InputError: there are too few, or their number is odd although each pair uses two.
    """
    if num_samples < pairing.min_samples:
        raise InputError(
            f"pairing {name} needs at least {pairing.min_samples} responses per prompt, but there "
            f"{'is 1' if num_samples == 1 else f'are {num_samples}'}: sample with --num_samples {pairing.min_samples} or more"
        )
    if pairing.even and num_samples % 2:
        raise InputError(
            f"pairing {name} uses two responses per row, but there are {num_samples} per prompt: sample with "
            f"--num_samples {num_samples + 1}"
        )


def label_rows(
    rows: Sequence[Row],
    scores: Sequence[float | None],
    win_probs: Sequence[Sequence[float]] | None = None,
    reference_score: float | None = None,
) -> None:
    """Add a scorer's labels to the rows of one prompt, in place: ``rejected_score``, ``chosen_score`` (that of the ground
    truth) and ``win_probs`` (if the scorer compares responses). ``scores[i]`` belongs to sample ``i``; None means it failed.

    Raises:
        InputError: the scorer returned a wrong number of scores, a value that is not finite, or win probabilities that
            contradict each other; the message names the prompt.
    """
    prompt_id = rows[0]["prompt_id"] if rows else ""
    if len(scores) != len(rows):
        raise InputError(
            f"the scorer returned {len(scores)} scores for the {len(rows)} responses of prompt {prompt_id}: fix the scorer"
        )
    for sample, score in enumerate((*scores, reference_score)):
        if score is not None and not math.isfinite(score):
            which = "the ground truth" if sample == len(scores) else f"sample {sample}"
            raise InputError(
                f"the score of prompt {prompt_id}, {which}, is {score}: the scorer must return finite scores"
            )
    if win_probs is not None:
        check_win_probs(win_probs, len(rows), prompt_id)
    for row in rows:
        sample = int(row["sample_index"])
        score = scores[sample]
        row["rejected_score"] = None if score is None else float(score)
        row["chosen_score"] = None if reference_score is None else float(reference_score)
        row["win_probs"] = None if win_probs is None else [float(value) for value in win_probs[sample]]


def check_win_probs(win_probs: Sequence[Sequence[float]], size: int, prompt_id: str) -> None:
    """Check that a win matrix is ``size`` by ``size``, within [0, 1], and that ``P_ik + P_ki = 1``.

    Raises:
        InputError: it is not; the message names the prompt and the two samples.
    """
    if len(win_probs) != size or any(len(line) != size for line in win_probs):
        shape = f"{len(win_probs)} x {'/'.join(map(str, sorted({len(line) for line in win_probs})))}"
        raise InputError(
            f"the win probabilities of prompt {prompt_id} are {shape}, not {size} x {size}: fix the scorer"
        )
    for i, line in enumerate(win_probs):
        for k, value in enumerate(line):
            if not 0 <= value <= 1:
                raise InputError(
                    f"the win probability of samples {i} and {k} of prompt {prompt_id} is {value}: it must be from 0 to 1"
                )
            if abs(value + win_probs[k][i] - 1) > 1e-6:
                raise InputError(
                    f"the win probabilities of samples {i} and {k} of prompt {prompt_id} are {value} and {win_probs[k][i]}: "
                    "they must add up to 1"
                )


def own_pair(better: Row, worse: Row) -> Row:
    """Return the pair of two of the model's own responses to a prompt; its sample index is that of the rejected side."""
    # The generated columns describe the rejected response; the better row moves to the chosen columns.
    return {name: value for name, value in worse.items() if name != "win_probs"} | {
        "chosen": better["rejected"],
        "chosen_token_ids": better["rejected_token_ids"],
        "chosen_finish_reason": better["rejected_finish_reason"],
        "chosen_score": better["rejected_score"],
    }


def best(rows: Sequence[Row]) -> Row:
    """Return the row with the highest score; the first one on a tie."""
    return max(rows, key=lambda row: float(row["rejected_score"]))


def check_ground_truth(row: Row, pairing: str) -> None:
    """Check that a prompt has a ground truth.

    Raises:
        InputError: it has none; the message names the prompt.
    """
    if row["chosen"] is None:
        raise missing_ground_truth(row["prompt_id"], pairing)


def missing_ground_truth(prompt_id: str, pairing: str) -> InputError:
    """Return the error for a prompt whose ground truth is missing."""
    return InputError(
        f"prompt {prompt_id} has no ground truth, which pairing {pairing} compares with: add it and generate again, or choose "
        "a pairing of the model's own responses such as best_vs_worst"
    )
