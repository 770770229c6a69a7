"""What every rule-based scorer receives and returns. Pure functions: no I/O, no project imports."""

from __future__ import annotations

from typing import Protocol


class Scorer(Protocol):
    """Scores one response; higher is better."""

    def __call__(self, prompt: str, response: str, reference: str) -> float: ...
