"""The best of the model's own responses against the ground truth: whichever scores higher is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spin.alignment.methods.pairings.base import best, check_ground_truth


def best_vs_ground_truth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one pair; none when both scores are equal or the ground truth has none. The ground truth has no token ids.

    Raises:
        InputError: the prompt has no ground truth.
    """
    own = best(rows)
    check_ground_truth(own, "best_vs_ground_truth")
    ground_truth_score, own_score = own["chosen_score"], own["rejected_score"]
    if ground_truth_score is None or ground_truth_score == own_score:
        return []
    pair = {name: value for name, value in own.items() if name != "win_probs"}
    if ground_truth_score > own_score:
        return [pair | {"chosen_token_ids": None, "chosen_finish_reason": None}]
    ours = {"chosen": own["rejected"], "chosen_score": own_score}
    ours |= {f"chosen_{name}": own[f"rejected_{name}"] for name in ("token_ids", "finish_reason")}
    # What was recorded of sampling belongs to the own response, which is not the rejected side any more.
    sampled = {
        name: None for name in pair if name in ("rejected_token_ids", "rejected_finish_reason", "rejected_logprobs")
    }
    return [pair | sampled | ours | {"rejected": own["chosen"], "rejected_score": ground_truth_score}]
