"""SPIN (arXiv 2401.01335): the ground truth is chosen, the model's own response is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import check_ground_truth


def ground_truth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair for each sample of the prompt, as it was generated.

    Raises:
        InputError: the prompt has no ground truth.
    """
    for row in rows:
        check_ground_truth(row, "ground_truth")
    return [dict(row) for row in rows]
