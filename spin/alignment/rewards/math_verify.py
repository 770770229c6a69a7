r"""1 when the library math-verify calls the final answer equal to the reference's: by algebra, not by text.

``math_answer`` needs no library and does no algebra. The two are different scorers, not one with a fallback, so that a score
never depends on what happens to be installed.
"""

from __future__ import annotations

import importlib.util

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.math_answer import marked_answer


def check_math_verify() -> None:
    """Raise :class:`InputError` when the library is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "scorer math_verify needs the library math-verify: pip install 'selfplay-spin[math]', or choose math_answer"
        )


def math_verify(prompt: str, response: str, reference: str) -> float:
    r"""Return 1.0 when both final answers are mathematically equal, else 0.0 (also when either cannot be parsed).

    The answer is found as by ``math_answer`` (after ``####``, in ``\boxed{}``); in a text without these marks the library looks
    for it. It gives up on an expression after five seconds, which counts as unequal, and works in the main thread only.

    Raises:
        InputError: the library is not installed.
    """
    check_math_verify()
    from math_verify import parse, verify

    truth, ours = parse(_shown(reference)), parse(_shown(response))
    return float(bool(truth) and bool(ours) and verify(truth, ours))


def _shown(text: str) -> str:
    marked, _ = marked_answer(text)
    return text if marked is None else f"\\boxed{{{marked}}}"
