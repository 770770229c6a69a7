"""Which response is chosen and which rejected. One file and one line here for each pairing."""

from spin.alignment.methods.pairings.base import EveryRow, Labelled, Pairing, check_num_samples, label_rows, no_truth
from spin.alignment.methods.pairings.best_vs_ground_truth import best_vs_ground_truth
from spin.alignment.methods.pairings.best_vs_random import best_vs_random
from spin.alignment.methods.pairings.best_vs_worst import best_vs_worst
from spin.alignment.methods.pairings.every_sample import REWARD_COLUMNS, every_sample
from spin.alignment.methods.pairings.ground_truth import ground_truth
from spin.alignment.methods.pairings.win_rate import WIN_COLUMNS, win_rate

PAIRINGS: dict[str, Pairing] = {
    "best_vs_ground_truth": Labelled(best_vs_ground_truth, needs=("rejected_score", "chosen_score"), min_samples=1),
    "best_vs_random": Labelled(best_vs_random),
    "best_vs_worst": Labelled(best_vs_worst),
    "every_sample": Labelled(every_sample, adds=REWARD_COLUMNS, even=True),
    "ground_truth": EveryRow(ground_truth),
    "win_rate": Labelled(win_rate, adds=WIN_COLUMNS),
}


def needs_truth(name: str) -> bool:
    """Return whether a pairing compares with the ground truth."""
    pairing = PAIRINGS[name]
    return not isinstance(pairing, Labelled) or pairing.reads_truth


__all__ = ["PAIRINGS", "EveryRow", "Labelled", "Pairing", "check_num_samples", "label_rows", "needs_truth", "no_truth"]
