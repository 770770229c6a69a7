r"""1 when the final answer of a solution equals the reference's: after ``####``, in ``\boxed{}``, else the last number."""

from __future__ import annotations

import re
from fractions import Fraction

# A minus behind a digit, letter or bracket is a subtraction, not a sign; commas count only between groups of three digits.
_NUMBER = re.compile(r"(?:(?<![\w)}])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def math_answer(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 when both final answers are the same number, else 0.0 (also when the response states none)."""
    ours, truth = final_number(response), final_number(reference)
    return float(ours is not None and ours == truth)


def final_number(text: str) -> Fraction | None:
    """Return the number a solution ends with, or ``None`` when it states none."""
    text = _FRACTION.sub(r"\1/\2", text)
    if "####" in text:
        text = text.rsplit("####", 1)[1]
        numbers = _NUMBER.findall(text)[:1]
    else:
        boxed = _BOXED.findall(text)
        numbers = _NUMBER.findall(boxed[-1] if boxed else text)[-1:]
    if not numbers:
        return None
    try:
        return Fraction(re.sub(r"[\s,]", "", numbers[0]))
    except (ValueError, ZeroDivisionError):
        return None
