"""What a kind of training says of itself in a model card, taken from the docstrings of its functions."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Described:
    """A kind of training in words: the title of its models, tags for the Hub, and paragraphs on the method and its limits."""

    title: str
    tags: tuple[str, ...]
    method: tuple[str, ...]
    limits: tuple[str, ...] = ()


def describe_function(name: str, function: Callable[..., Any]) -> str:
    """Return a sentence on a function of a method, such as a loss: its source (the docstring of its module) and its formula (the
    first paragraph of its own docstring); of a function without docstrings, that it is the user's own.
    """
    module = sys.modules.get(getattr(function, "__module__", ""))
    source = _paragraph(module.__doc__ if module is not None else None)
    formula = _paragraph(inspect.getdoc(function))
    if not source and not formula:
        return f"`{name}`, a function of the user's own without a description."
    formula = re.sub(r"^Returns? ", "It returns ", formula)
    return f"`{name}`: {' '.join(part for part in (source, formula) if part)}"


def _paragraph(docstring: str | None) -> str:
    """Return the first paragraph of a docstring as one line of Markdown."""
    first = (docstring or "").strip().split("\n\n")[0]
    plain = re.sub(r":\w+:`([^`]*)`", r"`\1`", first).replace("``", "`")
    return " ".join(plain.split())
