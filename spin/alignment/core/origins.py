"""Where each value of a configuration comes from: a file of its ``extends`` chain, with the line, or the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spin.alignment.core.config import load_chain, parse_overrides

COMMAND_LINE = "command line"


def origins(path: str | Path, arguments: Sequence[str] = ()) -> dict[str, str]:
    """Return ``file:line`` or ``command line`` for every value, by its key with dots between the levels.

    Raises:
        InputError: as :func:`spin.alignment.core.config.load_config`.
    """
    found: dict[str, str] = {}
    for file, content in load_chain(path):
        lines = _lines(file)
        found |= {key: f"{file}:{lines[key]}" if key in lines else str(file) for key in leaves(content)}
    return found | dict.fromkeys(leaves(parse_overrides(arguments)), COMMAND_LINE)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; ``dataset_mixer``, which is never merged, is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and key != "dataset_mixer":
            flat |= leaves(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _lines(file: Path) -> dict[str, int]:
    """Return the line of every key of a YAML file, by dotted key, from 1."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return dict(_lines_of(node, "")) if node is not None else {}


def _lines_of(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines_of(value, f"{prefix}{key.value}.")
