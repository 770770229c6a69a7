"""Columns of a source under the names of a known format: ``prompt=query``, ``response=extra.solution``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spin.alignment.core.errors import InputError, suggestion
from spin.alignment.data.foreign_forms import FOREIGN_FORMS
from spin.alignment.data.formats import FORMATS

_FORM_COLUMNS = frozenset(column for columns in (*FORMATS, *FOREIGN_FORMS) for column in columns)
# Pairs have their prompt in a column of its own, or inside ``chosen``.
_FORMS = (*FORMATS, *FOREIGN_FORMS, ("prompt", "chosen"))
# What the readers of the formats use besides the columns that identify a format.
TARGETS = _FORM_COLUMNS | {"prompt_id", "id", "rejected", "generated", "input", "system", "history", "tools"}
TARGETS |= {"chat_template_kwargs", "label", "reasoning_content"}


def column_mapping(given: Mapping[str, str]) -> dict[str, str]:
    """Return the mapping of a setting, checked: name in the format -> column of the source.

    ``prompt=query,response=solution`` may be written as one value.

    Raises:
        InputError: a name that no format has, or one that is mapped twice.
    """
    mapping: dict[str, str] = {}
    for name, value in given.items():
        first, *others = value.split(",") if "=" in value else [value]
        for target, column in [(name, first), *(tuple(item.partition("=")[::2]) for item in others)]:
            if target not in TARGETS:
                known = ", ".join(sorted(TARGETS))
                raise InputError(
                    f"columns maps '{target}', which no format has: map one of {known}{suggestion(target, TARGETS)}"
                )
            if not column or target in mapping:
                raise InputError(f"columns maps '{target}' to '{column}': give each name one column, as prompt=query")
            mapping[target] = column
    return mapping


def with_columns(record: Mapping[str, Any], mapping: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """Return a row with the mapped columns under their new names. Of the other columns that identify a format, those remain that
    complete the first format with a mapped column.

    ``a.b`` is the field ``b`` of the column ``a``, unless a column is named so.

    Raises:
        InputError: the row lacks a column.
    """
    if not mapping:
        return record
    used = {column if column in record else column.partition(".")[0] for column in mapping.values()}
    available = (record.keys() - used) | mapping.keys()
    forms = (columns for columns in _FORMS if available >= {*columns} and not mapping.keys().isdisjoint(columns))
    ignored = (_FORM_COLUMNS - {*next(forms, ())}) | used
    kept = {name: value for name, value in record.items() if name not in ignored}
    return kept | {target: _value(record, column, where) for target, column in mapping.items()}


def _value(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise InputError(
                f"{where} has no column '{column}' (it has {', '.join(record) or 'none'}): correct columns"
                f"{suggestion(column, record)}"
            )
        value = value[name]
    return value
