r"""1 if the library math-verify finds the final answer equal to that of the ground truth, by algebra rather than as text.

``math_answer`` needs no library and does no algebra. They are two scorers, rather than one with a fallback, so that a score
never depends on what happens to be installed.
"""

from __future__ import annotations

import importlib.util

from spin.alignment.core.errors import InputError
from spin.alignment.data.thoughts import without_thought
from spin.alignment.rewards.math_answer import marked_answer


def check_math_verify() -> None:
    """Raise :class:`InputError` if the library is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "scorer math_verify needs the library math-verify: pip install 'selfplay-spin[math]', or choose math_answer"
        )


def math_verify(prompt: str, response: str, reference: str) -> float:
    r"""Return 1.0 if both final answers are mathematically equal, otherwise 0.0 (also if either cannot be parsed).

    The answer is located as in ``math_answer`` (behind any thought, after ``####``, in ``\boxed{}``); without these marks the
    library looks for it. It gives up on an expression after five seconds, which counts as unequal, and only works in the main
    thread.

    Raises:
        InputError: the library is not installed.
    """
    check_math_verify()
    from math_verify import parse, verify

    ground_truth, ours = parse(_shown(reference)), parse(_shown(response))
    return float(bool(ground_truth) and bool(ours) and verify(ground_truth, ours))


def _shown(text: str) -> str:
    text = without_thought(text)
    marked, _ = marked_answer(text)
    return text if marked is None else f"\\boxed{{{marked}}}"
