"""A penalty for long responses, used as a term of a sum such as ``math_answer+0.1*length_penalty:max_chars=400``."""

from __future__ import annotations


def length_penalty(prompt: str, response: str, reference: str, *, max_chars: int = 1000) -> float:
    """Return 0.0 up to ``max_chars`` characters (without leading and trailing whitespace), beyond that minus the excess as a
    fraction of ``max_chars``: -1.0 at twice the length."""
    return min(0.0, 1.0 - len(response.strip()) / max_chars)
