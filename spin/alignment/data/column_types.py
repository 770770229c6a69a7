"""One type for each column of preference pairs, whatever wrote them: pandas, polars, Spark, ``datasets`` or this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.types as kinds

from spin.alignment.core.errors import InputError
from spin.alignment.data.rows import MESSAGES, OPTIONAL_COLUMNS, PREFERENCE_SCHEMA

_CONVERSION_ERRORS = (pa.ArrowException, OverflowError, UnicodeError, RecursionError)

# The types of the project's own columns. Turns may have more fields than these.
OWN_TYPES: dict[str, pa.DataType] = {field.name: field.type for field in PREFERENCE_SCHEMA} | OPTIONAL_COLUMNS


def joined(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """Return the rows of several tables as one. Columns that a table lacks are null in it.

    Args:
        names: what messages call each table.

    Raises:
        InputError: a column cannot have the same type in all tables without loss.
    """
    columns = list(dict.fromkeys(column for table in tables for column in table.column_names))
    types = {column: _common_type(column, tables, names) for column in columns}
    cast = [
        pa.table({column: _cast(table, column, types[column], name) for column in table.column_names})
        for table, name in zip(tables, names, strict=True)
    ]
    return pa.concat_tables(cast, promote_options="default")


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, places: Sequence[str]) -> pa.Table:
    """Return rows as a table; a value that a row lacks is null.

    Args:
        places: what messages call each row.

    Raises:
        InputError: a value does not have the type of its column.
    """
    arrays = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_floating(field.type):  # Arrow refuses whole numbers that a float only rounds
            values = [_rounded(value) for value in values]
        try:
            arrays.append(pa.array(values, field.type))
        except _CONVERSION_ERRORS:
            _name_wrong_value(values, field, places)
    return pa.table(arrays, schema)


def _rounded(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, int) else value
    except OverflowError:
        return value


def _name_wrong_value(values: Sequence[Any], field: pa.Field, places: Sequence[str]) -> NoReturn:
    for value, where in zip(values, places, strict=True):
        try:
            pa.array([value], field.type)
        except _CONVERSION_ERRORS as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{where} has a value of the wrong type in '{field.name}' ({reason}): see docs/data_format.md"
            ) from error
    raise RuntimeError(f"the column '{field.name}' cannot be converted, but each of its values can")


def _common_type(column: str, tables: Sequence[pa.Table], names: Sequence[str]) -> pa.DataType:
    own = OWN_TYPES.get(column)
    common: pa.DataType | None = MESSAGES if own == MESSAGES else None
    for table, name in zip(tables, names, strict=True) if own in (None, MESSAGES) else ():
        if column in table.column_names:
            found = plain_type(table.schema.field(column).type)
            merged = found if common is None else merged_type(common, found)
            if merged is None:
                raise InputError(
                    f"the column '{column}' of {name} is {found}, but {common} elsewhere: give it one type in all files"
                )
            common = merged
    return common or own


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type without what concerns only its storage: large or dictionary-encoded, sizes of numbers, nullability."""
    if kinds.is_dictionary(kind):
        return plain_type(kind.value_type)
    if kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return pa.string()
    if kinds.is_integer(kind):
        return pa.int64()
    if kinds.is_floating(kind):
        return pa.float64()
    if kinds.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list of any storage."""
    tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view)
    return any(test(kind) for test in tests)


def merged_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return a plain type that holds the values of two others, or ``None``."""
    if left == right or kinds.is_null(right):
        return left
    if kinds.is_null(left):
        return right
    if {left, right} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if is_list(left) and is_list(right):
        inner = merged_type(left.value_type, right.value_type)
        return None if inner is None else pa.list_(inner)
    if kinds.is_struct(left) and kinds.is_struct(right):
        fields = {field.name: field.type for field in left}
        for field in right:
            merged = merged_type(fields.get(field.name, pa.null()), field.type)
            if merged is None:
                return None
            fields[field.name] = merged
        return pa.struct(list(fields.items()))
    return None


def _cast(table: pa.Table, column: str, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    values = table[column]
    if values.type == kind:
        return values
    try:
        if column == "prompt_id" and kinds.is_floating(values.type):  # whole numbers that pandas made floats
            values = values.cast(pa.int64())
        if column == "prompt_id" and not (kinds.is_integer(values.type) or plain_type(values.type) == pa.string()):
            raise pa.ArrowInvalid("an id is a text or a whole number")
        try:
            return values.cast(kind)
        except pa.ArrowNotImplementedError:  # rare storage inside lists; Python objects know no storage
            return pa.chunked_array([pa.array(values.to_pylist(), kind)], kind)
    except _CONVERSION_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: the column '{column}' ({values.type}) cannot be read as {kind} ({reason}): correct the column"
        ) from error
