r"""1 if the final answer of a solution equals that of the ground truth.

The answer follows ``####`` (a Markdown heading is none) or is in ``\boxed{}``; otherwise it is the last number. Numbers are
compared by value. Anything else marked as the answer (a root, an interval, an expression) is compared as text after normalising
LaTeX; there is no algebra (``math_verify`` does that).
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
_BARE_BOX = re.compile(r"\\f?boxed\s+([^\s{}$\\]+)")
_BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
# Words around a number ("about 0.5", "42 apples") are not part of it; a single letter is a variable.
_WORDS = re.compile(r"(?<![\w\\])[^\W\d_]{2,}(?![\w(\\])\.?")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(_TEXT.pattern + r"(?:\s*\^\s*\{?\d\}?)?")
# What follows #### is a formula, not just a number with words around it.
_FORMULA = re.compile(r"\\[a-z]{2}|\^|\d[a-z]\b|^[(\[{]|[+=<>]|\d:\d|\d,\s+\d")
_HEAD = 100  # characters of a line that decide whether it is a heading or an answer
_MARK = re.compile(r"(?<!#)####(?!#)([^\n]*)")
# A number that is the answer follows #### at once, but for its sign, currency and emphasis.
_LEADING_NUMBER = re.compile(r"[*_$\\\s({\[\u2212+~≈€£-]*(?:frac|dfrac|boxed)?\s*\{?\s*[.]?\d")
_LABEL = re.compile(r"^[*_\s]*(?:the\s+)?(?:final\s+)?(?:answer|result)\s*(?:[:=]|is\b)\s*:?[*_\s]*", re.IGNORECASE)
_NAMED = re.compile(r"([^\W\d_]{2,})(?: [^\W\d_]+){0,4}:\s*(.+)")
_ENUMERATED = re.compile(r"[*_]*\d+\s*[.):]\s+[*_]*[^\W\d_]")
_TITLED = re.compile(r"[*_]*[^\W\d_][\w ]*\d*\s*[:.]\s+\S")  # "Step 2: add", "Case A. even"
_HEADINGS = frozenset(
    {
        *(
            "step",
            "steps",
            "part",
            "case",
            "section",
            "task",
            "problem",
            "question",
            "given",
            "note",
            "example",
            "method",
        ),
        *("approach", "reasoning", "analysis", "calculation", "explanation", "verification", "check", "checking"),
        *("solution", "summary", "conclusion", "final", "answer"),
    }
)
_SIGNS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\?\$|\\?%|\^\s*(?:\\circ(?![a-z])|\{\\circ\})")


class Box(NamedTuple):
    """The content of a ``\\boxed{}``, and the position in the text after its closing brace."""

    content: str
    end: int


def math_answer(prompt: str, response: str, reference: str) -> float:
    """Return 1.0 if both final answers, behind any thought, are the same, otherwise 0.0 (also if the response has none)."""
    ours, ground_truth = (reasoned_answer(text) for text in (response, reference))
    return float(ours is not None and ours == ground_truth)


def reasoned_answer(text: str) -> Fraction | str | None:
    """Return :func:`final_answer` of what follows any thought in a response."""
    return final_answer(without_thought(text))


def final_answer(text: str) -> Fraction | str | None:
    """Return the final answer of a solution: a number, the normal form of any other marked answer, or ``None``."""
    shown, boxed = marked_answer(text)
    if shown is None:
        return final_number(text)
    number = plain_number(shown) if boxed or _FORMULA.search(shown) else _first_number(shown)
    return number if number is not None else normal_form(shown) or None


def marked_answer(text: str) -> tuple[str | None, bool]:
    r"""Return the text that a solution marks as its answer, or ``None``, and whether it is the content of a box.

    A Markdown heading (``#### Step 2: add``) is no answer. Of the lines that start with ``####``, the last one that is a number
    counts, otherwise the last one that is no heading; a box after it wins. Without such a line, the last box counts.
    """
    lines = [(mark.end(), _without_label(mark[1])) for mark in _MARK.finditer(text)]
    ends = {end: shown for end, shown in lines if _LEADING_NUMBER.match(shown[:_HEAD]) and not _is_heading(shown)}
    ends = ends or {
        end: shown for end, shown in lines if shown and not _is_heading(shown, more=bool(text[end:].strip()))
    }
    if not ends:
        box = last_box(text)
        return (box.content, True) if box else (None, False)
    end = max(ends)
    # A box may stand in the line itself: "#### \boxed{7}".
    box = last_box(text[end - len(ends[end]) :])
    return (box.content, True) if box else (ends[end], False)


def final_number(text: str) -> Fraction | None:
    """Return the final number of a solution, or ``None`` if it has none."""
    shown, boxed = marked_answer(text)
    if shown is not None and not boxed:
        return _first_number(shown)
    searched = _MARK.sub("", text) if shown is None else shown  # no line that starts with #### is an answer
    return _value(numbers[-1]) if (numbers := _numbers(searched)) else None


def _is_heading(shown: str, more: bool = False) -> bool:
    """Return whether the text after ``####`` is a Markdown heading; ``more`` if text follows it."""
    words = re.findall(r"[^\W\d_]{2,}", shown[:_HEAD])
    if _ENUMERATED.match(shown[:_HEAD]) or shown.rstrip("*_ ").endswith(":") or _TITLED.match(shown[:_HEAD]):
        return True
    return bool(words) and (words[0].lower() in _HEADINGS or (more and len(words) > 1 and not re.search(r"\d", shown)))


def _without_label(shown: str) -> str:
    shown = _LABEL.sub("", shown.strip()).strip()
    named = _NAMED.fullmatch(shown[:_HEAD])  # "Total: 5"
    is_answer = named and named[1].lower() not in _HEADINGS and plain_number(named[2]) is not None
    return named[2] if named and is_answer else shown


def _first_number(shown: str) -> Fraction | None:
    return _value(numbers[0]) if (numbers := _numbers(shown)) else None


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(_plain_fractions(text.replace("\u2212", "-")))


def plain_number(shown: str) -> Fraction | None:
    """Return the value of an answer that is a single number, ignoring units, currency and ``x =``; otherwise ``None``."""
    text = shown.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "")
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
    r"""Return the last ``\boxed{...}`` whose braces are balanced, however deeply nested; without any, the last ``\boxed 5``."""
    for match in reversed(list(_BOX.finditer(text))):
        # A regular expression cannot match nested braces; escaped ones (\{) are skipped by matching \\. first.
        depth = 0
        for sign in re.finditer(r"\\.|[{}]", text[match.end() - 1 :]):
            depth += {"{": 1, "}": -1}.get(sign[0], 0)
            if depth == 0 and sign[0] == "}":
                end = match.end() - 1 + sign.end()
                return Box(text[match.end() : end - 1], end)
    bare = list(_BARE_BOX.finditer(text))
    return Box(bare[-1][1].rstrip(".,;"), bare[-1].end()) if bare else None


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
