"""The id that a row brings with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.text import is_unicode


def source_id(record: Mapping[str, Any], where: str, columns: tuple[str, ...] = ("prompt_id", "id")) -> str | None:
    """Return the id of a row, the first of ``columns`` that it has; ``None`` if it has none, or an empty one.

    Raises:
        InputError: the id is neither text nor a number, or contains half a character.
    """
    column = next((name for name in columns if name in record), columns[0])
    value = record.get(column)
    if isinstance(value, str) and value and is_unicode(value):
        return value
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | list | tuple | dict | bytes):
        raise InputError(f"{where}: '{column}' is {type(value).__name__}, not a text or a number: correct the row")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else _text(value, where, column)
    if not is_unicode(text):
        raise InputError(f"{where} has an unpaired surrogate (half a character) in '{column}': correct the row")
    return text


def _text(value: Any, where: str, column: str) -> str:
    try:
        return str(value)
    except ValueError as error:  # Python prints no whole number of more than 4,300 digits
        raise InputError(f"{where}: '{column}' is too large a number for an id: make it a text") from error
