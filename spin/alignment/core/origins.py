"""Where each value of a configuration comes from: a file and line of its ``extends`` chain, or the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.alignment.core.config import load_chain, parse_overrides
from spin.alignment.core.yaml_text import key_lines

COMMAND_LINE = "command line"


def origins(path: str | Path, arguments: Sequence[str] = ()) -> dict[str, str]:
    """Return ``file:line`` or ``command line`` for every value, by dotted key.

    Raises:
        InputError: as :func:`spin.alignment.core.config.load_config`.
    """
    found: dict[str, str] = {}
    for file, content in load_chain(path):
        lines = key_lines(file.read_text(encoding="utf-8"))
        found |= {key: f"{file}:{lines[key]}" if key in lines else str(file) for key in leaves(content)}
    return found | dict.fromkeys(leaves(parse_overrides(arguments)), COMMAND_LINE)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; ``dataset_mixer``, which is never merged, counts as one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and key != "dataset_mixer":
            flat |= leaves(value, f"{name}.")
        else:
            flat[name] = value
    return flat
