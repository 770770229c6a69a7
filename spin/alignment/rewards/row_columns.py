"""The other columns of a row (a constraint, a difficulty, ...): passed by name to the rules whose signature asks for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from spin.alignment.core.errors import InputError
from spin.alignment.rewards.base import Score, Scorer

TEXTS = ("prompt", "response", "reference")


@dataclass(frozen=True)
class AskedColumns:
    """The columns that a rule takes as keyword arguments.

    Attributes:
        required, optional: names of its parameters without a default, and with one.
        settings: parameters with a number as default, which are set in the scorer's name and never filled from a column.
        every: whether it takes any keyword argument.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    every: bool = False

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for one row.

        Raises:
            InputError: the row lacks a column that the rule requires.
        """
        missing = [name for name in self.required if name not in columns]
        if missing:
            found = ", ".join(sorted(columns)) or "none"
            raise InputError(
                f"the rule takes '{missing[0]}', but the row has no such column besides those trained on (it has {found}): add "
                "the column to the data, or give the parameter a default"
            )
        taken = columns if self.every else {*self.required, *self.optional} & columns.keys()
        return {name: columns[name] for name in taken if name not in (*TEXTS, *self.settings)}


@functools.lru_cache(maxsize=256)
def asked_columns(rule: Callable[..., Any]) -> AskedColumns:
    """Return the columns that a rule's signature asks for besides its three texts."""
    try:
        parameters = list(inspect.signature(rule).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return AskedColumns()
    positional = [item for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    texts = {item.name for item in positional[: len(TEXTS)]}
    named = [
        item
        for item in parameters
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY) and item.name not in texts
    ]
    settings = [item for item in named if isinstance(item.default, int | float)]
    columns = [item for item in named if item not in settings]
    return AskedColumns(
        required=tuple(item.name for item in columns if item.default is item.empty),
        optional=tuple(item.name for item in columns if item.default is not item.empty),
        settings=tuple(item.name for item in settings),
        every=any(item.kind is item.VAR_KEYWORD for item in parameters),
    )


def score_response(
    rule: Scorer, prompt: str, response: str, reference: str, columns: Mapping[str, Any]
) -> float | Score:
    """Return a rule's score of one response in a row with these other columns.

    Raises:
        InputError: the row lacks a column that the rule requires.
    """
    function = cast("Callable[..., float | Score]", rule)
    return function(prompt, response, reference, **asked_columns(function).select(columns))
