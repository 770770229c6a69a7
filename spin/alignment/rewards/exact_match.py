"""1 if the response equals the ground truth, ignoring leading and trailing whitespace."""

from __future__ import annotations

from spin.alignment.data.thoughts import without_thought


def exact_match(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 if both texts are equal without their thoughts and after stripping, otherwise 0.0."""
    return float(stated_answer(response) == stated_answer(reference))


def stated_answer(text: str) -> str:
    """Return a response without its thought and surrounding whitespace."""
    return without_thought(text).strip()
