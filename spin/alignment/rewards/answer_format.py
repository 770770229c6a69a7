r"""1 if a response ends in the required format, correct or not: a line ``#### number``, or ``\boxed{...}``."""

from __future__ import annotations

import re

from spin.alignment.data.thoughts import without_thought
from spin.alignment.rewards.math_answer import last_box

_NUMBER_LINE = re.compile(r"####\$?-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\\?%?\.?")  # of a line without spaces
# What may follow the box: the end of the sentence, of the formula, of bold type.
_CLOSING = re.compile(r"(?:\\\]|\\\)|\\end\{[a-z]+\*?\}|[\s$.!*])*")


def answer_format(prompt: str, response: str, reference: str) -> float:
    r"""Return 1.0 if the last line is ``#### number`` or the text ends with a non-empty ``\boxed{}``, otherwise 0.0.

    The box may only be followed by the end of the sentence or of the formula.
    """
    text = without_thought(response).strip()  # an unfinished thought may end in anything
    if _NUMBER_LINE.fullmatch("".join(text.rpartition("\n")[2].split())):
        return 1.0
    box = last_box(text)
    return float(box is not None and bool(box.content.strip()) and _CLOSING.fullmatch(text, box.end) is not None)
