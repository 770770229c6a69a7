"""The reward of the sorting demos, computed from the prompt alone: an example of a reward function by dotted path."""

from __future__ import annotations


def is_sorted(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 when the response is the prompt's letters in order, else 0.0; the reference is not used."""
    return float(response.strip() == "".join(sorted(prompt.strip())))
