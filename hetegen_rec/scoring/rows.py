"""Rows in the forms in which callers have them, as one Arrow table."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import DataError

Row: TypeAlias = Mapping[str, Any]
"""A row by its columns; a column that it lacks is a missing value."""
Rows: TypeAlias = Any
"""Rows as a list of `Row`, a pyarrow Table or RecordBatch, or a pandas or polars data frame."""


def as_table(rows: Rows, schema: Schema, columns: Iterable[str]) -> pa.Table:
    """The columns of rows that are read, as an Arrow table.

    Args:
        rows: see `Rows`. Columns beside those that are read do no harm.
        schema: the fields.
        columns: of the raw data, those to read.

    Raises:
        DataError: they are none of these forms, or a column holds values that do not fit together.
    """
    names = list(columns)
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if hasattr(rows, "to_arrow"):  # polars
        return rows.to_arrow()
    if hasattr(rows, "iloc"):  # pandas
        return _of_frame(rows[[name for name in names if name in rows]])
    if isinstance(rows, Iterable) and not isinstance(rows, Mapping | str | bytes):
        return _of_mappings(list(rows), schema, names)
    raise DataError(
        f"rows are {type(rows).__name__}; give a list of dictionaries, an Arrow table, or a pandas or polars "
        "data frame"
    )


def _of_frame(frame: Any) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"the data frame: {error}; each column must be there once, of one type") from error


def _of_mappings(rows: list[Row], schema: Schema, names: list[str]) -> pa.Table:
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {place} is {type(row).__name__}, not a dictionary of columns")
    lists = {field.column for field in schema.fields if field.is_list}
    others = {field.column for field in schema.fields if field.kind != "numeric"}
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            if name not in others:
                values = [_number(value) for value in values]
            columns[name] = _array(values, is_list=name in lists)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise DataError(
                f"column {name!r}: {error}; all its values must be of one type, that of the training rows"
            ) from error
    return pa.table(columns)


def _array(values: list[Any], *, is_list: bool) -> pa.Array:
    try:
        array = pa.array(values, from_pandas=True)  # to which NaN, in lists too, and pandas' NA are nulls
    except (pa.ArrowException, OverflowError):
        array = None
    if array is None or (is_list and pa.types.is_floating(array.type)):
        array = _array_of_plain(values, is_list=is_list)
    return array.cast(pa.list_(pa.null())) if is_list and pa.types.is_null(array.type) else array


def _array_of_plain(values: list[Any], *, is_list: bool) -> pa.Array:
    """Scalars of numpy as Python's: NaN among them fits neither strings nor lists nor large integers."""
    plain = [_plain(value) for value in values]
    try:
        return pa.array(plain, from_pandas=True)
    except OverflowError:  # integers from 2**63 on, which Arrow does not take for unsigned by itself
        kind = pa.list_(pa.uint64()) if is_list else pa.uint64()
        return pa.array(plain, kind, from_pandas=True)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _number(value: Any) -> Any:
    """Integers as the floats that training makes of them; Arrow refuses those that a float rounds."""
    return float(value) if isinstance(value, int | np.integer) else value
