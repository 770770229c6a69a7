r"""1 when a response ends in the asked form, right or wrong: a line ``#### number``, or ``\boxed{...}``."""

from __future__ import annotations

import re

from spin.alignment.rewards.math_answer import last_box

_NUMBER_LINE = re.compile(r"####\$?-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\\?%?\.?")  # without its spaces
# What may stand behind the box: the end of its sentence, of its formula, of bold type.
_CLOSING = re.compile(r"(?:\\\]|\\\)|\\end\{[a-z]+\*?\}|[\s$.!*])*")


def answer_format(prompt: str, response: str, reference: str) -> float:
    r"""Return 1.0 when the last line is ``#### number`` or the text ends with a ``\boxed{}`` that is not empty, else 0.0.

    Behind the box only the end of the sentence or of the formula may stand.
    """
    text = response.strip()
    if _NUMBER_LINE.fullmatch("".join(text.rpartition("\n")[2].split())):
        return 1.0
    box = last_box(text)
    return float(box is not None and bool(box.content.strip()) and _CLOSING.fullmatch(text, box.end) is not None)
