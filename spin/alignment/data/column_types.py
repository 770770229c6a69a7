"""One type for each column of preference pairs, whatever wrote them: pandas, polars, Spark, ``datasets`` or this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from spin.alignment.core.errors import InputError
from spin.alignment.core.sides import SIDES
from spin.alignment.data.columns import REASONING_KEYS, SYSTEM_COLUMNS
from spin.alignment.data.foreign_forms import FOREIGN_PAIR_COLUMNS
from spin.alignment.data.refused_columns import LABEL_COLUMNS
from spin.alignment.data.rows import CARRIED_TYPES, MESSAGES, OPTIONAL_COLUMNS, PREFERENCE_SCHEMA
from spin.alignment.data.turns import OPTIONAL_FIELDS

_CONVERSION_ERRORS = (pa.ArrowException, OverflowError, UnicodeError, RecursionError)

# The types of the project's own columns. Turns may have more fields than these.
OWN_TYPES: dict[str, pa.DataType] = {field.name: field.type for field in PREFERENCE_SCHEMA} | OPTIONAL_COLUMNS
# Columns that mark rows in the format of docs/data_format.md.
OWN_COLUMNS = frozenset({"prompt_id", "sample_index", *SIDES})
# Columns of other tools that the reader of foreign rows understands, or refuses by their value.
_READ_FIRST = frozenset({*SYSTEM_COLUMNS, *REASONING_KEYS, *LABEL_COLUMNS, *FOREIGN_PAIR_COLUMNS, "functions"})


def is_own_format(schema: pa.Schema) -> bool:
    """Return whether pairs are in the format of docs/data_format.md as they are, so that nothing in them has to be read first:
    their own columns, turns of text, and no column that other tools' rows put into the conversation."""
    names = set(schema.names)
    if not (names >= OWN_COLUMNS and names.isdisjoint(_READ_FIRST)):
        return False
    for field in schema:
        kind = plain_type(field.type)
        if OWN_TYPES.get(field.name) == MESSAGES and not _is_plain_conversation(kind):
            return False
        if field.name in CARRIED_TYPES and not (kinds.is_null(kind) or kind == pa.string()):
            return False
        if field.name == "prompt" and is_list(kind):
            return False
        is_of_side = field.name not in OWN_TYPES and field.name.startswith(tuple(f"{side}_" for side in SIDES))
        if is_of_side and not (kinds.is_null(kind) or kinds.is_integer(kind) or kinds.is_floating(kind)):
            return False
    return True


def _is_plain_conversation(kind: pa.DataType) -> bool:
    """Return whether a type is a list of turns whose fields are the project's own, all of them text."""
    if not (is_list(kind) and kinds.is_struct(kind.value_type)):
        return False
    fields = {field.name: field.type for field in kind.value_type}
    known = fields.keys() <= {"role", "content", *OPTIONAL_FIELDS} and fields.keys() >= {"role", "content"}
    return known and all(kinds.is_null(found) or found == pa.string() for found in fields.values())


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
            arrays.append(_whole_array(values, field.type))
        except _CONVERSION_ERRORS:
            _name_wrong_value(values, field, places)
    return pa.table(arrays, schema)


def _whole_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return values as an array. Arrow itself cuts the fraction off a Python float, and takes null among ids."""
    inner = kind.value_type if kinds.is_list(kind) else kind
    if kinds.is_integer(inner):
        items = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
        if any(isinstance(item, float) and not item.is_integer() for item in items):
            raise pa.ArrowInvalid("a number with a fraction")
    array = pa.array(values, kind)
    if _has_null_items(array):
        raise pa.ArrowInvalid("null in a list of numbers")
    return array


def check_items(rows: pa.RecordBatch, name: str) -> None:
    """Check that no list of numbers in the project's own columns has null in it.

    Raises:
        InputError: one has.
    """
    for column in rows.schema.names:
        _check_items(rows.column(column), column, name)


def _check_items(values: pa.Array | pa.ChunkedArray, column: str, name: str) -> None:
    if column in OWN_TYPES and _has_null_items(values):
        raise InputError(f"{name}: the column '{column}' has null in a list of numbers: correct the column")


def _has_null_items(array: pa.Array | pa.ChunkedArray) -> bool:
    kind = array.type
    is_numbers = is_list(kind) and (kinds.is_integer(kind.value_type) or kinds.is_floating(kind.value_type))
    return is_numbers and pc.list_flatten(array).null_count > 0


def _rounded(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, int) else value
    except OverflowError:
        return value


def _name_wrong_value(values: Sequence[Any], field: pa.Field, places: Sequence[str]) -> NoReturn:
    for value, where in zip(values, places, strict=True):
        try:
            _whole_array([value], field.type)
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
    _check_items(values, column, name)
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
