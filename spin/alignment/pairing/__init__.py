"""Which response is chosen and which rejected. One file and one line here for each pairing."""

from spin.alignment.pairing.base import EveryRow, Pairing
from spin.alignment.pairing.ground_truth import ground_truth

PAIRINGS: dict[str, Pairing] = {
    "ground_truth": EveryRow(ground_truth),
}

__all__ = ["PAIRINGS", "EveryRow", "Pairing"]
