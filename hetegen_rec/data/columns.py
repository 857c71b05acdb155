"""Raw columns as values: types checked and unified, missing values out, lists cut to length.

Whatever width or encoding a shard stores, a field's values become one of

    integer   int64          every integer and boolean type, and whole floating-point numbers (what
                             integers with nulls often are on disk) as far as their type tells them
                             apart; uint64 by its bits
    string    large_string   plain, large, view and dictionary-encoded strings
    number    float64        the values of `numeric` fields, -0.0 made 0.0

so that shards of int32 and int64 give the same ids. Digits in a string are not an integer: a column
is one or the other in all shards. Missing are null and NaN; an empty string is a value. Infinities
are numbers, below and above all others. Strings are checked to be UTF-8, which Arrow does not do.
"""

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hetegen_rec.config.schema import Field, Schema
from hetegen_rec.data.errors import BadRowsError
from hetegen_rec.data.raw import column_keys

ValueType: TypeAlias = Literal["integer", "string", "number", "none"]
"""`none` is that of rows without values, which fits every other type."""

_TYPE_NAMES: dict[pa.DataType, ValueType] = {
    pa.int64(): "integer",
    pa.large_string(): "string",
    pa.float64(): "number",
    pa.null(): "none",
}


_EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}
"""Whole numbers of a floating-point type are told apart below this power of two."""


@dataclass(frozen=True)
class FieldValues:
    """The values of one field in B rows, those that are kept."""

    values: pa.Array
    """int64, large_string, float64 or null type, without nulls; row by row. A sequence's rows stand
    most recent first."""
    lengths: npt.NDArray[np.int64]
    """[B] values of each row; 0 where the value is missing or the list is empty."""

    @property
    def value_type(self) -> ValueType:
        """Name of the type of the values; `none` if there are none, whatever the column's type."""
        return _TYPE_NAMES[self.values.type] if len(self.values) else "none"


def field_values(table: pa.Table, field: Field, first_row: int, where: str) -> FieldValues:
    """The kept values of one field.

    A list loses its nulls, then `multi_valued` keeps its first `max_length` values and `sequence`
    its last, the most recent, and reverses them.

    Args:
        table: raw columns.
        field: the field.
        first_row: index of the table's first row in the split, for errors.
        where: file and row group, for errors.

    Raises:
        BadRowsError: the column's type does not fit the field's kind, or a value is none of it.
    """
    array = _plain(_column(table, field.column))
    if not field.is_list:
        rows = np.arange(len(array))
        present, values = _canonical(array, rows + first_row, field, where)
        return FieldValues(values, present.astype(np.int64))
    if pa.types.is_null(array.type):
        return FieldValues(array.drop_null(), np.zeros(len(array), np.int64))
    if not _is_list(array.type):
        raise _wrong_type(field, "lists", array.type, where)
    # A null may stand before values that it hides; flattening leaves them out.
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(array)), lengths)
    present, values = _canonical(_plain(pc.list_flatten(array)), rows + first_row, field, where)
    return _cut(values, rows[present], len(array), field)


def type_in(field: Field, stored: pa.DataType) -> ValueType:
    """The type that a field's values would have where the column is stored so; `none` if none fits."""
    if field.is_list:
        stored = stored.value_type if _is_list(stored) else pa.null()
    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    if pa.types.is_null(stored):
        return "none"
    if field.kind == "numeric":
        return "number" if _is_number(stored) else "none"
    if _is_text(stored):
        return "string"
    return "integer" if _is_number(stored) and not pa.types.is_decimal(stored) else "none"


def time_unit(stored: pa.DataType) -> str | None:
    """The unit in which `timestamps` reads a column that is stored so; None if it can hold no time.

    `integer` is whatever unit their writer had in mind.
    """
    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    if pa.types.is_integer(stored):
        return "integer"
    if pa.types.is_date32(stored):
        return "timestamp[s]"
    if pa.types.is_timestamp(stored):
        return f"timestamp[{stored.unit}]"
    return None


def labels(table: pa.Table, schema: Schema, first_row: int, where: str) -> npt.NDArray[np.float32]:
    """[B] labels, 0 or 1.

    Raises:
        BadRowsError: the column is not a number or boolean, or a row holds anything but 0 and 1.
    """
    array = _plain(_column(table, schema.label))
    if not _is_number(array.type):
        raise BadRowsError(
            f"{where}: label column {schema.label!r}: expected 0 and 1 as numbers or booleans, "
            f"found {array.type}; convert it"
        )
    # Large integers are rounded, not refused by Arrow: they are no labels either way.
    values: npt.NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise BadRowsError(
            f"{where}: label column {schema.label!r}: row {first_row + wrong[0]} of the split holds "
            f"{array[int(wrong[0])].as_py()!r}, expected 0 or 1 ({len(wrong)} such row(s) here); "
            "convert or drop them"
        )
    return values.astype(np.float32)


def timestamps(table: pa.Table, schema: Schema, where: str) -> npt.NDArray[np.int64]:
    """[B] event times, in the unit of the column; 0 where missing.

    Raises:
        BadRowsError: the column is neither integer nor a time, or a number is too large for a time.
    """
    if schema.timestamp is None:
        raise ValueError("the schema has no timestamp")
    array = _plain(_column(table, schema.timestamp))
    kind = array.type
    if pa.types.is_date32(kind):
        array = array.cast(pa.timestamp("s"))
    elif not (pa.types.is_integer(kind) or pa.types.is_timestamp(kind) or pa.types.is_null(kind)):
        raise BadRowsError(
            f"{where}: timestamp column {schema.timestamp!r}: expected integers or timestamps, found {kind}"
        )
    try:
        times: npt.NDArray[np.int64] = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise BadRowsError(
            f"{where}: timestamp column {schema.timestamp!r}: {error}; write times as signed 64-bit integers"
        ) from error
    return times


def require_columns(
    table: pa.Table,
    schema: Schema,
    where: str,
    *,
    labelled: bool = True,
    fields: Iterable[Field] | None = None,
) -> None:
    """Raises BadRowsError unless the table has every column that is read (see `column_keys`), once."""
    for column, key in column_keys(schema, labelled=labelled, fields=fields).items():
        times = table.column_names.count(column)
        if times > 1:
            raise BadRowsError(f"{where}: {times} columns {column!r} (`{key}`); leave all but one out")
        if not times:
            raise BadRowsError(
                f"{where}: no column {column!r} (`{key}`); there are: {', '.join(table.column_names)}"
            )


def _column(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).combine_chunks()


def _plain(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One contiguous array, dictionaries decoded and string views (few kernels know them) resolved."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array


def _canonical(
    array: pa.Array, rows: npt.NDArray[np.int64], field: Field, where: str
) -> tuple[npt.NDArray[np.bool_], pa.Array]:
    """Which values are there, and those in the field's type; `rows` says to which row each belongs."""
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), None, array)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    values = array.drop_null() if array.null_count else array
    if pa.types.is_null(values.type):
        return present, values
    if field.kind == "numeric":
        return present, _numbers(values, field, where)
    return present, _identities(values, rows[present], field, where)


def _numbers(values: pa.Array, field: Field, where: str) -> pa.Array:
    if not _is_number(values.type):
        raise _wrong_type(field, "numbers", values.type, where)
    # Adding zero turns -0.0, which is equal but has other bits, into 0.0.
    return pa.array(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) + 0.0)


def _identities(values: pa.Array, rows: npt.NDArray[np.int64], field: Field, where: str) -> pa.Array:
    kind = values.type
    if pa.types.is_uint64(kind):
        return pa.array(values.to_numpy(zero_copy_only=False).view(np.int64))
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.int64())
    if pa.types.is_floating(kind):
        return _whole_numbers(values, rows, field, where)
    if _is_text(kind):
        return _utf8(values.cast(pa.large_string()), rows, field, where)
    raise _wrong_type(field, "integers or strings", kind, where)


def _whole_numbers(values: pa.Array, rows: npt.NDArray[np.int64], field: Field, where: str) -> pa.Array:
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    exact_bits = _EXACT_BITS[values.type]
    wrong = np.flatnonzero((numbers != np.trunc(numbers)) | (np.abs(numbers) >= 2.0**exact_bits))
    if len(wrong):
        first = wrong[0]
        raise _bad_rows(
            field,
            where,
            f"row {rows[first]} of the split holds {numbers[first]}; a {values.type} column may hold whole "
            f"numbers only, below 2**{exact_bits} (it does not tell larger ones apart); write int64, with "
            "nulls where values are missing, or use kind `numeric`",
        )
    return pa.array(numbers.astype(np.int64))


def _utf8(strings: pa.Array, rows: npt.NDArray[np.int64], field: Field, where: str) -> pa.Array:
    if not _is_valid(strings):
        first = bisect(range(len(strings)), False, key=lambda last: not _is_valid(strings.slice(0, last + 1)))
        value = strings.cast(pa.large_binary())[first].as_py()
        raise _bad_rows(
            field,
            where,
            f"row {rows[first]} of the split holds {value[:40]!r}, which is not UTF-8; write it as UTF-8",
        )
    return strings


def _is_valid(array: pa.Array) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _cut(values: pa.Array, rows: npt.NDArray[np.int64], num_rows: int, field: Field) -> FieldValues:
    """Keeps at most `list_length` values a row; `rows` says to which row each value belongs."""
    lengths = np.bincount(rows, minlength=num_rows)
    starts = np.cumsum(lengths) - lengths
    kept = np.minimum(lengths, field.list_length)
    kept_rows = np.repeat(np.arange(num_rows), kept)
    rank = np.arange(len(kept_rows)) - np.repeat(np.cumsum(kept) - kept, kept)
    if field.kind == "sequence":
        rank = lengths[kept_rows] - 1 - rank
    return FieldValues(values.take(pa.array(starts[kept_rows] + rank)), kept)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def _wrong_type(field: Field, expected: str, found: Any, where: str) -> BadRowsError:
    return _bad_rows(
        field, where, f"expected {expected}, found {found}; change the field's kind or convert the column"
    )


def _bad_rows(field: Field, where: str, problem: str) -> BadRowsError:
    return BadRowsError(f"{where}: column {field.column!r} of {field.kind} field {field.name!r}: {problem}")
