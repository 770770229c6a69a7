"""Resolving the name of a rule to a function: a registered name, ``module:function``, parameters, a weighted sum."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.resolve import import_function
from spin.alignment.rewards.base import Score, Scorer
from spin.alignment.rewards.ifeval import check_ifeval
from spin.alignment.rewards.math_verify import check_math_verify
from spin.alignment.rewards.row_columns import TEXTS, score_response

# Rules that need a package which may not be installed.
_CHECKS = {"ifeval": check_ifeval, "math_verify": check_math_verify}


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of scorers: the sum of ``weight * scorer``."""

    terms: tuple[tuple[float, Scorer], ...]

    def __call__(self, prompt: str, response: str, reference: str, **columns: Any) -> float:
        # fsum rounds once, so the score does not depend on the order of the terms.
        return math.fsum(
            weight * _value(score_response(scorer, prompt, response, reference, columns))
            for weight, scorer in self.terms
        )


def _value(score: float | Score) -> float:
    """Return the one number of a score that is added to others."""
    return score.value if isinstance(score, Score) else score


def find_rule(name: str, registry: Mapping[str, Scorer], models: Mapping[str, Any]) -> Scorer:
    """Return the function that a rule's name stands for.

    ``name`` is a term, or several joined by ``+``: ``[weight*]rule[:parameter=value,...]``. A rule is a name in ``registry`` or
    ``module:function``, imported with the current folder on the path. Parameters beyond the three texts are columns of the row
    (see ``row_columns.py``), those with a number as default are set in the name.

    Args:
        models: names of scorers that are not functions, to give a helpful error.

    Raises:
        InputError: unknown, not importable, not callable, not a function of three texts, or a bad weight or parameter.
    """
    parts = [part.strip() for part in name.split("+")]
    terms = []
    for part in parts:
        weight, star, rule = part.rpartition("*")
        if not rule:
            raise InputError(f"scorer '{name}' has an empty term: join rules as in math_answer+0.1*format")
        if rule in models and rule == name:
            raise InputError(
                f"{rule} is a model, but only rule functions are supported here: choose one of {', '.join(registry)}"
            )
        if rule in models:
            raise InputError(
                f"{rule} is a model and cannot be part of the sum '{name}': only rule functions can be added"
            )
        terms.append((_weight(weight, part) if star else 1.0, _find_one(rule.strip(), registry, models)))
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return WeightedSum(tuple(terms))


def functions_of(scorer: Scorer) -> list[Scorer]:
    """Return the functions that a scorer from :func:`find_rule` consists of, without their parameters."""
    terms = [term for _, term in scorer.terms] if isinstance(scorer, WeightedSum) else [scorer]
    return [term.func if isinstance(term, functools.partial) else term for term in terms]


def _weight(text: str, term: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise InputError(
            f"'{text}' in the scorer's term '{term}' is not a weight: write a number other than 0, as in 0.1*format"
        )
    return value


def _find_one(rule: str, registry: Mapping[str, Scorer], models: Mapping[str, Any]) -> Scorer:
    head, _, tail = rule.rpartition(":")
    path, parameters = (head, tail) if "=" in tail else (rule, "")
    if path in registry:
        function: Any = registry[path]
        if path in _CHECKS:
            _CHECKS[path]()
    elif ":" in path:
        function = import_function(path, "scorer", takes=TEXTS, takes_more=True)
    else:
        names = ", ".join(sorted([*registry, *models]))
        raise InputError(f"unknown scorer '{path}': choose one of {names}, or write module:function")
    if parameters:
        function = _with_parameters(function, path, parameters)
    return function


def _with_parameters(function: Callable[..., Any], path: str, text: str) -> Scorer:
    """Bind ``key=value,...`` to the function; keys are its keyword-only parameters with a numeric default."""
    known = {
        item.name: item.default
        for item in inspect.signature(function).parameters.values()
        if item.kind is item.KEYWORD_ONLY and isinstance(item.default, (int, float))
    }
    values = {}
    for assignment in text.split(","):
        key, _, value = (part.strip() for part in assignment.partition("="))
        if key not in known:
            raise InputError(f"scorer {path} has no parameter '{key}': it has {', '.join(known) or 'none'}")
        try:
            values[key] = type(known[key])(value)
        except ValueError:
            values[key] = math.nan
        if not values[key] > 0 or math.isinf(values[key]):
            raise InputError(f"{key} of scorer {path} is '{value}': write a number above 0, such as {known[key]}")
    return functools.partial(function, **values)
