r"""1 if the final answer of a solution equals that of the ground truth.

The answer follows ``####`` or is in ``\boxed{}``; otherwise it is the last number. Numbers are compared by value. Anything else
marked as the answer (a root, an interval, an expression) is compared as text after normalising LaTeX; there is no algebra
(``math_verify`` does that).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from spin.alignment.data.thoughts import without_thought

# A minus after a digit, letter or bracket is a subtraction, not a sign; commas count only between groups of three digits.
_NUMBER = re.compile(r"(?:(?<![\w)}])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)")
# Both \frac{3}{4} and \frac34, optionally after a whole number (1\frac12 is 3/2). At most 40 digits: int() rejects very long
# strings.
_FRACTION = re.compile(
    r"(?:(?<![\d.])(\d{1,40})\s*)?\\[dtc]?frac\s*(?:\{\s*(-?\d{1,40})\s*\}\s*\{\s*(\d{1,40})\s*\}|(\d)\s*(\d))"
)
_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
# Words around a number ("about 0.5", "42 apples") are not part of it; a single letter is a variable.
_WORDS = re.compile(r"(?<![\w\\])[^\W\d_]{2,}(?![\w(\\])\.?")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(_TEXT.pattern + r"(?:\s*\^\s*\{?\d\}?)?")
# What follows #### is a formula, not just a number with words around it.
_FORMULA = re.compile(r"\\[a-z]{2}|\^|\d[a-z]\b|^[(\[{]|[+=<>]")
_SIGNS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\?\$|\\?%|\^\s*(?:\\circ(?![a-z])|\{\\circ\})")


class Box(NamedTuple):
    """The content of a ``\\boxed{}``, and the position in the text after its closing brace."""

    content: str
    end: int


def math_answer(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 if both final answers, behind any thought, are the same, otherwise 0.0 (also if the response has none)."""
    ours, ground_truth = (final_answer(without_thought(text)) for text in (response, reference))
    return float(ours is not None and ours == ground_truth)


def final_answer(text: str) -> Fraction | str | None:
    """Return the final answer of a solution: a number, the normal form of any other marked answer, or ``None``."""
    shown, boxed = marked_answer(text)
    if shown is None:
        return final_number(text)
    number = final_number(text) if not boxed and not _FORMULA.search(shown) else plain_number(shown)
    return number if number is not None else normal_form(shown) or None


def marked_answer(text: str) -> tuple[str | None, bool]:
    r"""Return the text that a solution marks as its answer, or ``None``, and whether it is the content of a box.

    If the text contains ``####``, only what follows the last one counts: a box in it, otherwise the rest of the line.
    """
    _, marks, tail = text.rpartition("####")
    box = last_box(tail)
    if box is not None:
        return box.content, True
    return (tail.strip().partition("\n")[0] if marks else None), False


def final_number(text: str) -> Fraction | None:
    """Return the final number of a solution, or ``None`` if it has none."""
    box = last_box(text)
    if "####" in text:
        numbers = _NUMBER.findall(_plain_fractions(text.rsplit("####", 1)[1]))[:1]
    else:
        numbers = _NUMBER.findall(_plain_fractions(box.content if box else text))[-1:]
    return _value(numbers[0]) if numbers else None


def plain_number(shown: str) -> Fraction | None:
    """Return the value of an answer that is a single number, ignoring units, currency and ``x =``; otherwise ``None``."""
    text = shown.replace("{,}", ",").replace("\\!", "")
    text = _UNIT.sub(" ", text)
    text = re.sub(r"^\s*\\?[a-zA-Z]\w*(?:\([a-z]\))?\s*=", "", _plain_fractions(text))
    text = _WORDS.sub(" ", text)
    match = _NUMBER.fullmatch(re.sub(r"^(-?)\s+(?=\d)", r"\1", _SIGNS.sub("", text).strip()).rstrip("."))
    return _value(match[0]) if match else None


def normal_form(shown: str) -> str:
    """Return the normal form of an answer that is not a number: without spaces, sizes, styles and redundant braces."""
    text = _TEXT.sub(r"\1", shown.replace("{,}", ","))
    text = re.sub(r"\\[dtc]frac", r"\\frac", re.sub(r"\s", "", _SIGNS.sub("", text)))
    text = re.sub(r"^\\?[a-zA-Z]\w*=(?=.)", "", text.rstrip("."))
    for _ in range(2):  # x^{2} is x^2, and \sqrt{3} is \sqrt3
        text = re.sub(r"(?<!\\)\{(\w)\}", r"\1", text)
    return text


def last_box(text: str) -> Box | None:
    r"""Return the last ``\boxed{...}`` whose braces are balanced, however deeply nested."""
    for match in reversed(list(_BOX.finditer(text))):
        # A regular expression cannot match nested braces; escaped ones (\{) are skipped by matching \\. first.
        depth = 0
        for sign in re.finditer(r"\\.|[{}]", text[match.end() - 1 :]):
            depth += {"{": 1, "}": -1}.get(sign[0], 0)
            if depth == 0 and sign[0] == "}":
                end = match.end() - 1 + sign.end()
                return Box(text[match.end() : end - 1], end)
    return None


def _plain_fractions(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        top, bottom = match[2] or match[4], match[3] or match[5]
        return f"{int(match[1]) * int(bottom) + int(top)}/{bottom}" if match[1] else f"{top}/{bottom}"

    return _FRACTION.sub(plain, text)


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[\s,]", "", number))
    except (ValueError, ZeroDivisionError):
        return None
