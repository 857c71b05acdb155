"""CSV and TSV: their columns, how many rows they hold, and streaming them as Arrow tables.

An empty cell is a missing value (a quoted empty string is a value), ids are read as strings, numbers as
doubles, and lists as strings with values separated by `|`: types never depend on what a block happens to
hold.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hetegen_rec.config.schema import Field, Schema
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.opening import ColumnKeys, check_columns, check_kind, one_line, reading

CSV_BLOCK_BYTES = 16 << 20
"""Bytes of CSV parsed at a time."""
LIST_SEPARATOR = "|"

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def is_csv(path: str) -> bool:
    """Whether the name says CSV or TSV; anything else is taken for Parquet."""
    return _text_suffix(path) in _DELIMITERS


def csv_tables(path: str, schema: Schema, columns: ColumnKeys) -> Iterator[pa.Table]:
    """Streams columns of a file in tables of bounded size, in the types that the schema gives them.

    Raises:
        BadRowsError: a column is missing, or the file cannot be read in these types.
        DataError: two fields want one column in two types.
    """
    types = _types(path, schema)
    check_columns(path, columns, csv_names(path))
    lists = {field.column for field in schema.fields if field.is_list}
    for batch in _batches(path, list(columns), types):
        arrays = [
            pc.split_pattern(array, LIST_SEPARATOR) if name in lists else array
            for name, array in zip(batch.schema.names, batch.columns, strict=True)
        ]
        yield pa.table(arrays, batch.schema.names)


def _types(path: str, schema: Schema) -> dict[str, pa.DataType]:
    types = {schema.label: pa.float64()}
    readers: dict[str, Field] = {}
    for field in schema.fields:
        first = readers.setdefault(field.column, field)
        if "numeric" in (first.kind, field.kind) and first.kind != field.kind:
            # Ids that were read as numbers would be others: `07` and `7` would be one.
            raise DataError(
                f"{path}: column {field.column!r} cannot be read as numbers and as text, for {first.kind} "
                f"field {first.name!r} and {field.kind} field {field.name!r}: CSV has no types; write the "
                "column twice, under two names, or write Parquet"
            )
        types[field.column] = pa.float64() if field.kind == "numeric" else pa.string()
    if schema.timestamp:
        types[schema.timestamp] = pa.int64()
    return types


def csv_names(path: str) -> list[str]:
    """The names in the header of a file."""
    with _parsing(path), _reader(path, [], {}) as reader:
        names: list[str] = reader.schema.names
        return names


def count_csv_rows(path: str, first: str) -> int:
    """Rows of a file, of which one column is read: `first`."""
    # Bytes hold whatever the column holds.
    return sum(batch.num_rows for batch in _batches(path, [first], {first: pa.binary()}))


def _batches(path: str, columns: list[str], types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    try:
        with _reader(path, columns, types) as reader:
            yield from reader
    except OSError as error:
        raise BadRowsError(f"{path}: cannot be read; it may be truncated or damaged: {error}") from error
    except pa.ArrowInvalid as error:
        names = csv_names(path)
        message = re.sub(r"CSV column #(\d+)", lambda match: f"column {names[int(match[1])]!r}", _said(error))
        raise BadRowsError(f"{path}: {message}") from error


@contextmanager
def _reader(
    path: str, columns: list[str], types: Mapping[str, pa.DataType]
) -> Iterator[pa.csv.CSVStreamingReader]:
    options: dict[str, Any] = {
        "read_options": pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        "parse_options": pa.csv.ParseOptions(
            delimiter=_DELIMITERS[_text_suffix(path)], newlines_in_values=True
        ),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=columns,
            column_types=dict(types),
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        ),
    }
    with ExitStack() as stack:
        source = path
        if "://" in path:
            source = stack.enter_context(fsspec.open(path, "rb"))
        else:
            check_kind(path)
        compression = _COMPRESSIONS.get(PurePath(path.lower()).suffix)
        stream = stack.enter_context(pa.input_stream(source, compression=compression))
        yield stack.enter_context(pa.csv.open_csv(stream, **options))


@contextmanager
def _parsing(path: str) -> Iterator[None]:
    with reading(path):
        try:
            yield
        except pa.ArrowInvalid as error:
            if _is_too_long(error):
                raise BadRowsError(f"{path}: {_said(error)}") from error
            raise


def _said(error: Exception) -> str:
    """What Arrow says, without advice that cannot be followed here."""
    if _is_too_long(error):
        return f"a row is longer than {CSV_BLOCK_BYTES >> 20} MiB, or a quote is not closed"
    return one_line(error)


def _is_too_long(error: Exception) -> bool:
    return "straddling object" in str(error)


def _text_suffix(path: str) -> str:
    name = PurePath(path.lower())
    return PurePath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix
