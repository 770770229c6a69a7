"""The settings of a program for people: the key tables of the docs, and the usage of programs that take a configuration file."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from spin.alignment.core.settings import MISSING, declaration_of, default_of, grouped, hints_of

WIDTH = 110


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field in words: ``0.1``, ``false``, ``none``, or what ``None`` stands for."""
    default = default_of(field)
    if default is MISSING:
        return ""
    if default is None or default in ("", [], {}, ()):
        return declaration_of(field).unset or "none"
    return "its own defaults" if dataclasses.is_dataclass(default) else _text(default)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", f"{value:g}")
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def key_table(fields: Iterable[dataclasses.Field[Any]], config_class: type, prefix: str = "") -> str:
    """Return a markdown table of settings: name (behind ``prefix``), default, meaning."""
    rows = [f"| {'flag' if prefix == '--' else 'key'} | default | meaning |", "| --- | --- | --- |"]
    hints = hints_of(config_class)
    for field in fields:
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        named = ", ".join(f"`{choice}`" for choice in choices)
        meaning = f"{named}; {declaration_of(field).help}" if named else declaration_of(field).help
        rows.append(f"| `{prefix}{field.name}` | {default_text(field) or 'must be given'} | {meaning} |")
    return "\n".join(rows)


def usage(command: str, summary: str, config_classes: Sequence[type], rest: str) -> str:
    """Return the ``--help`` of a program that takes a configuration file: every key with its sentence and default.

    Args:
        command: the command line up to the configuration file.
        rest: what else the file may hold, and where to read on.
    """
    lines = [f"usage: {command} CONFIG.yaml [--key=value ...]", "", *textwrap.wrap(summary, WIDTH)]
    seen: set[str] = set()
    for config_class in config_classes:
        for heading, fields in grouped(config_class).items():
            new = [field for field in fields if field.name not in seen]
            seen |= {field.name for field in new}
            if new:
                lines += ["", f"{heading or 'settings'}:", *(line for field in new for line in _usage_lines(field))]
    return "\n".join([*lines, "", *textwrap.wrap(rest, WIDTH)])


def _usage_lines(field: dataclasses.Field[Any]) -> list[str]:
    default = default_text(field)
    text = declaration_of(field).help + f" ({f'default: {default}' if default else 'must be given'})"
    first = f"  {field.name}".ljust(30) + " "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * 31, break_on_hyphens=False)
