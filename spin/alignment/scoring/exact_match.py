"""1 when the response equals the reference, white space at the ends aside."""

from __future__ import annotations

from spin.alignment.scoring.base import need_reference


def exact_match(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 when both texts are equal after stripping, else 0.0.

    Raises:
        InputError: the reference is empty.
    """
    need_reference(reference, "exact_match")
    return float(response.strip() == reference.strip())
