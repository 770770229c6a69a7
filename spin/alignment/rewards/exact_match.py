"""1 if the response equals the ground truth, ignoring leading and trailing whitespace."""

from __future__ import annotations


def exact_match(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 if both texts are equal after stripping, otherwise 0.0."""
    return float(response.strip() == reference.strip())
