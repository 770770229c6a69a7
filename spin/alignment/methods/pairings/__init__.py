"""Pairings select the chosen and the rejected response: one file per pairing and one line per pairing here."""

from __future__ import annotations

from spin.alignment.core.resolve import resolve
from spin.alignment.methods.labels import PAIR_WIN_PROB, REWARD, SCORE, WIN_PROB, Label
from spin.alignment.methods.pairings.base import (
    EveryRow,
    Labelled,
    Pairing,
    check_num_samples,
    label_rows,
    missing_ground_truth,
)
from spin.alignment.methods.pairings.best_vs_ground_truth import best_vs_ground_truth
from spin.alignment.methods.pairings.best_vs_random import best_vs_random
from spin.alignment.methods.pairings.best_vs_worst import best_vs_worst
from spin.alignment.methods.pairings.every_sample import EverySample, every_sample
from spin.alignment.methods.pairings.ground_truth import ground_truth
from spin.alignment.methods.pairings.win_rate import win_rate

PAIRINGS: dict[str, Pairing] = {
    "best_vs_ground_truth": Labelled(best_vs_ground_truth, needs=("rejected_score", "chosen_score"), min_samples=1),
    "best_vs_random": Labelled(best_vs_random),
    "best_vs_worst": Labelled(best_vs_worst),
    "every_sample": EverySample(every_sample, labels=(REWARD,), prefers=False, relative=REWARD),
    "ground_truth": EveryRow(ground_truth),
    "win_rate": Labelled(win_rate, labels=(WIN_PROB, PAIR_WIN_PROB)),
}


def find_pairing(name: str) -> Pairing:
    """Return a pairing by its configured name: one in :data:`PAIRINGS`, or ``module:function`` of a user's own file.

    Raises:
        InputError: the pairing does not exist, or does not take the rows of a prompt.
    """
    found = resolve(PAIRINGS, name, "pairing", takes=("rows",))
    return found if isinstance(found, Pairing) else Pairing(found)


def known_labels() -> set[Label]:
    """Return the labels that the registered pairings write, including the score."""
    return {SCORE, *(label for name in PAIRINGS for label in find_pairing(name).own_labels)}


def writers(label: Label) -> list[str]:
    """Return the names of the registered pairings that write a label."""
    return [name for name in PAIRINGS if find_pairing(name).writes(label)]


__all__ = [
    "PAIRINGS",
    "EveryRow",
    "Labelled",
    "Pairing",
    "check_num_samples",
    "find_pairing",
    "known_labels",
    "label_rows",
    "missing_ground_truth",
    "writers",
]
