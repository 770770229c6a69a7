"""Problems of one row in the project's format: its turns, token ids, finish reasons, labels and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import INITIAL, SIDES

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

FINISH_REASONS = ("stop", "length")


def row_problems(row: dict[str, Any], where: str, is_pair: bool, encoder: ChatEncoder | None) -> list[str]:
    """Return the violations of the row contract: turns, token ids, finish reasons, weights."""
    from spin.alignment.data.chat_encoder import template_arguments
    from spin.alignment.data.preference_forms import check_pair
    from spin.alignment.data.turns import check_conversation, prompt_turns

    problems = []
    try:
        if is_pair and row["chosen"] is None and row["rejected"]:  # generated from a prompt without ground truth
            check_conversation(row["rejected"][:-1], where, ground_truth_required=False)
        elif is_pair:
            check_pair(row["chosen"], row["rejected"], where, row.get("chosen_token_ids") is not None)
        else:
            # As written by reformat.py --allow_prompts, prompts may lack the ground truth.
            check_conversation(row["chosen"], where, ground_truth_required=False)
    except InputError as error:
        return [str(error)]
    responses = (*SIDES, *([INITIAL] if row.get(INITIAL) else []))
    for side in responses if is_pair else ():
        problems += [
            f"{where}: {problem}" for problem in (*side_problems(row, side, encoder), *label_problems(row, side))
        ]
    if encoder is not None:
        try:
            prompt = prompt_turns(row["rejected" if is_pair else "chosen"])
            encoder.prompt_ids(prompt, **template_arguments(row))
        except InputError as error:
            problems.append(f"{where}: {error}")
    return problems


def label_problems(row: dict[str, Any], side: str) -> list[str]:
    """Return which labels of a response are not finite, or not in [0, 1] although they are probabilities."""
    from spin.alignment.methods.pairings import known_labels

    problems = []
    for label in known_labels():
        value = row.get(f"{side}_{label.name}")
        if value is not None and not label.allows(value):
            wanted = "in [0, 1]" if label.is_probability else "finite"
            problems.append(f"{side}_{label.name} is {value}: it must be {wanted}")
    return problems


def side_problems(row: dict[str, Any], side: str, encoder: ChatEncoder | None) -> list[str]:
    """Return the problems of one response: its ids against its text, its end, and its weights."""
    from spin.alignment.data.stored_ids import ids_problem

    ids, reason, weights = (row.get(f"{side}_{name}") for name in ("token_ids", "finish_reason", "weights"))
    problems = []
    if reason is not None and reason not in FINISH_REASONS:
        problems.append(f"{side}_finish_reason is '{reason}': it must be stop or length")
    if ids is None:
        return problems
    if not ids:
        problems.append(f"{side}_token_ids is empty: a response has at least its end token")
    if reason is None:
        problems.append(f"{side}_token_ids has no {side}_finish_reason")
    if weights is not None and len(weights) != len(ids):
        problems.append(f"{len(weights)} {side}_weights for {len(ids)} {side}_token_ids")
    if encoder is None or not ids:
        return problems
    if not 0 <= min(ids) <= max(ids) < len(encoder.tokenizer):
        return [
            *problems,
            f"{side}_token_ids contains ids outside of the tokenizer's 0 to {len(encoder.tokenizer) - 1}",
        ]
    ends = [position for position, token in enumerate(ids) if token in encoder.stop_ids]
    if reason == "stop" and ends != [len(ids) - 1]:
        problems.append(f"{side}_finish_reason is stop, but the ids contain {len(ends)} end tokens, not one at the end")
    if reason == "length" and ends:
        problems.append(f"{side}_finish_reason is length, but the ids contain an end token")
    if problem := ids_problem(row, side, encoder):
        problems.append(problem)
    return problems
