"""Reading and checking the column ``instructions`` of a row."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spin.alignment.core.errors import InputError, suggestion

COLUMN = "instructions"
_NAMES = {int: "a whole number of 1 or more", str: "a text", list[str]: "a list of texts"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row: the name of its kind, and the arguments of the kind's function."""

    kind: str
    arguments: Mapping[str, Any]


def read_instructions(value: Any, kinds: Mapping[str, Callable[..., bool]]) -> list[Instruction]:
    """Return the instructions in a column: a list of objects, or its JSON text.

    Raises:
        InputError: it is not such a list, or it is empty; a kind is unknown; an argument is missing, unknown or of another type.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{COLUMN}' is not JSON text ({error}): write a list of objects with 'kind'") from error
    if not isinstance(value, list) or not value:
        raise InputError(
            f"'{COLUMN}' is {value!r}: write a list of one or more objects such as "
            '{"kind": "bullets", "arguments": {"count": 3}}'
        )
    return [_read_one(item, kinds) for item in value]


def _read_one(item: Any, kinds: Mapping[str, Callable[..., bool]]) -> Instruction:
    if not isinstance(item, Mapping) or not isinstance(item.get("kind"), str) or item.keys() - {"kind", "arguments"}:
        raise InputError(f"'{COLUMN}' contains {item!r}: write an object with 'kind' and, if it takes any, 'arguments'")
    kind, given = item["kind"], item.get("arguments") or {}
    if kind not in kinds:
        raise InputError(
            f"unknown instruction '{kind}': choose one of {', '.join(kinds)}{suggestion(kind, list(kinds))}"
        )
    if not isinstance(given, Mapping):
        raise InputError(f"the arguments of the instruction {kind} are {given!r}: write an object")
    # Rows that went through parquet have a null for every argument that only other rows have.
    arguments = {name: value for name, value in given.items() if value is not None}
    known = arguments_of(kinds[kind])
    if unknown := sorted(arguments.keys() - known.keys()):
        raise InputError(f"the instruction {kind} has no argument '{unknown[0]}': it has {', '.join(known) or 'none'}")
    for name, (wanted, required) in known.items():
        if name not in arguments and required:
            raise InputError(f"the instruction {kind} needs the argument '{name}': {_NAMES[wanted]}")
        if name in arguments and not _fits(arguments[name], wanted):
            raise InputError(f"'{name}' of the instruction {kind} is {arguments[name]!r}: write {_NAMES[wanted]}")
    return Instruction(kind, arguments)


@functools.cache
def arguments_of(kind: Callable[..., bool]) -> dict[str, tuple[Any, bool]]:
    """Return the arguments of a kind besides the response: name -> (type, whether it is required)."""
    hints = typing.get_type_hints(kind)
    _, *parameters = inspect.signature(kind).parameters.values()
    return {item.name: (hints[item.name], item.default is item.empty) for item in parameters}


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if wanted is str:
        return isinstance(value, str) and bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)
