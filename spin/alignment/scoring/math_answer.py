r"""1 when the final answer of a solution equals the reference's: after ``####``, in ``\boxed{}``, else the last number."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def math_answer(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 when both final answers are the same number, else 0.0 (also when the response states none)."""
    ours, truth = final_number(response), final_number(reference)
    return float(ours is not None and ours == truth)


def final_number(text: str) -> Fraction | None:
    """Return the number a solution ends with, or ``None`` when it states none."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
        numbers = _NUMBER.findall(text)[:1]
    else:
        boxed = _BOXED.findall(text)
        numbers = _NUMBER.findall(boxed[-1] if boxed else text)[-1:]
    if not numbers:
        return None
    try:
        return Fraction(numbers[0].replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None
