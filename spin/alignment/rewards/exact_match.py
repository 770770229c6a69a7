"""1 when the response equals the reference, white space at the ends aside."""

from __future__ import annotations


def exact_match(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 when both texts are equal after stripping, else 0.0."""
    return float(response.strip() == reference.strip())
