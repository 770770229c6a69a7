"""The command line of a settings dataclass: one flag per setting, ``--help``, and the conversion back to arguments."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from spin.alignment.core.config import convert, key_values
from spin.alignment.core.errors import InputError, shown
from spin.alignment.core.key_tables import default_text
from spin.alignment.core.program import Parser
from spin.alignment.core.settings import (
    MISSING,
    check_outputs,
    checked_value,
    declaration_of,
    default_of,
    grouped,
    hints_of,
    settings_of,
)
from spin.alignment.core.yaml_text import parse_yaml

C = TypeVar("C")


def parser_of(config_class: type, prog: str) -> Parser:
    """Return the parser of a program; its description is the first paragraph of the class's docstring."""
    description = inspect.cleandoc(config_class.__doc__ or "").partition("\n\n")[0]
    parser = Parser(prog=prog, description=description, formatter_class=argparse.HelpFormatter)
    hints = hints_of(config_class)
    for heading, fields in grouped(config_class).items():
        group = parser.add_argument_group(heading or "settings")
        for field in fields:
            group.add_argument(f"--{field.name}", **_argument(field, hints[field.name]))
    return parser


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    default = default_of(field)
    required = default is MISSING
    # A flag that is not given is left to the dataclass, so that its default is defined in one place.
    argument: dict[str, Any] = {"required": required, "default": argparse.SUPPRESS}
    # argparse formats help with %, so a literal % is doubled below.
    shown = "" if required or default is False else f" (default: {default_text(field)})"
    argument["help"] = (declaration_of(field).help + shown).replace("%", "%%")
    if hint is bool:
        return argument | {"action": "store_true"}
    kind = typing.get_origin(hint) or hint
    choices = choices_of(hint)
    argument["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else _metavar(hint)
    if kind in (list, tuple, dict):
        argument |= {"nargs": "+", "action": "extend"}
    return argument


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values of a ``Literal``; empty for any other type."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _metavar(hint: Any) -> str:
    kinds = members_of(hint)
    if typing.get_args(kinds[0])[1:] == (Any,):
        return "JSON"
    if kinds[0] is dict or typing.get_origin(kinds[0]) is dict:
        return "KEY=VALUE"
    if typing.get_origin(kinds[0]) in (list, tuple):
        kinds = members_of(typing.get_args(kinds[0])[0])
    names = [{int: "N", float: "X"}.get(kind, "TEXT") for kind in kinds if not choices_of(kind)]
    return "|".join([*names, *(str(choice) for kind in kinds for choice in choices_of(kind))])


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the types in a union, without ``None``; for any other type, that type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(item for item in typing.get_args(hint) if item is not type(None))
    return (hint,)


def from_arguments(config_class: type[C], arguments: Sequence[str], prog: str) -> C:
    """Parse a command line into a settings dataclass, checked.

    Raises:
        InputError: an unknown flag (the closest one is suggested), a missing one, a value of the wrong type or out of range, or
            an output that cannot be written.
    """
    given = vars(parser_of(config_class, prog).parse_args(list(arguments)))
    hints = hints_of(config_class)
    fields = settings_of(config_class)
    for name, text in given.items():
        given[name] = checked_value(fields[name], hints[name], _read(text, hints[name], f"--{name}"), f"--{name}")
    config = config_class(**given)
    check_outputs(config, "--{}".format)
    return config


def _read(text: Any, hint: Any, where: str) -> Any:
    """Convert the string of a flag, or the strings of a flag that takes several, to the type of its setting."""
    if isinstance(text, bool):
        return text
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and inner[1] is Any:
        return _read_mapping(text, where)
    if origin is dict:
        return {key: _read(item, inner[1], where) for key, item in key_values(text, where).items()}
    if origin in (list, tuple):
        return origin(_read(item, inner[0], where) for item in text)
    if int in members_of(hint):
        try:
            return convert(int(text), hint, where)
        except ValueError:
            pass  # not an integer: convert() tries the other members of the union, or names the flag in its error
    return convert(text, hint, where)


def _read_mapping(texts: Sequence[str], where: str) -> dict[str, Any]:
    """Read a mapping of any values: one JSON object, or ``key=value`` texts whose values are YAML.

    Raises:
        InputError: neither of them.
    """
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        try:
            return dict(json.loads(texts[0], object_pairs_hook=_unique, parse_constant=_refuse_constant))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error}): correct the value") from error
    found = {}
    for key, text in key_values(texts, where).items():
        try:
            found[key] = parse_yaml(text)
        except ValueError as error:
            raise InputError(
                f"{where} contains {shown(f'{key}={text}')}, which is not YAML ({error}): quote it"
            ) from error
    return found


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless it repeats a key: Python would keep the last value only."""
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' occurs twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


def to_arguments(config: Any) -> list[str]:
    """Return the command line that produces this configuration: every setting that differs from its default."""
    arguments: list[str] = []
    hints = hints_of(type(config))
    for name, field in settings_of(type(config)).items():
        value = getattr(config, name)
        if value is None or value == default_of(field):
            continue
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, Mapping) and typing.get_args(hints[name])[1:] == (Any,):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, Mapping):
            arguments += [f"--{name}={key}={item}" for key, item in value.items()]
        else:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [f"--{name}={item}" for item in values]
    return arguments
