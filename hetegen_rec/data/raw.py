"""Raw files: finding them, their row groups, and streaming their rows as Arrow tables.

Parquet, and CSV or TSV with a header (by suffix, also compressed as `.gz`, `.bz2`, `.zst`). Paths may
be URLs that fsspec knows, such as `s3://bucket/day=1/*.parquet`.

In CSV an empty cell is a missing value (a quoted empty string is a value), ids are read as strings,
numbers as doubles, and lists as strings with values separated by `|`: types never depend on what a
block happens to hold.
"""

import glob
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from hetegen_rec.config.schema import Schema

BATCH_ROWS = 65_536
"""Most rows of Parquet held at a time by `iter_tables`."""
CSV_BLOCK_BYTES = 16 << 20
"""Bytes of CSV parsed at a time."""
LIST_SEPARATOR = "|"

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS = {".gz", ".bz2", ".zst"}

ColumnKeys: TypeAlias = Mapping[str, str]
"""Columns to read, each with the configuration key that names it."""


class DataError(ValueError):
    """The data are not what the configuration says. The message names the place and the fix."""


@dataclass(frozen=True)
class RowGroup:
    """The unit in which raw rows are shared out: a Parquet row group, or a whole CSV file."""

    path: str
    index: int
    """Index of the row group in its file; 0 for CSV."""
    num_rows: int
    first_row: int
    """Index of its first row in the split."""

    @property
    def where(self) -> str:
        """Its place, for errors."""
        return self.path if is_csv(self.path) else f"{self.path}, row group {self.index}"


def is_csv(path: str) -> bool:
    """Whether the name says CSV or TSV; anything else is taken for Parquet."""
    return _text_suffix(path) in _DELIMITERS


def expand_paths(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs stand for: sorted within a pattern, patterns in their order.

    Raises:
        DataError: a pattern matches no file.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = _glob(pattern)
        if not matches:
            raise DataError(f"no file matches {pattern!r}; check the paths under `data`")
        found.update(dict.fromkeys(matches))
    return list(found)


def group_sizes(path: str) -> list[int]:
    """Rows of each row group of one file: from the footer of Parquet, by counting for CSV.

    Raises:
        DataError: the file cannot be read.
    """
    if is_csv(path):
        return [_count_csv_rows(path)]
    with _reading(path), _parquet(path) as file:
        metadata = file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def row_groups(sizes: Sequence[tuple[str, Sequence[int]]]) -> list[RowGroup]:
    """The row groups of a split from the `group_sizes` of its files, in order; empty ones are left out."""
    groups, first_row = [], 0
    for path, rows_of_groups in sizes:
        for index, num_rows in enumerate(rows_of_groups):
            if num_rows:
                groups.append(RowGroup(path, index, num_rows, first_row))
            first_row += num_rows
    return groups


def list_row_groups(patterns: Sequence[str]) -> list[RowGroup]:
    """The row groups of all files that the patterns stand for; reads footers only (of Parquet)."""
    return row_groups([(path, group_sizes(path)) for path in expand_paths(patterns)])


def column_keys(schema: Schema, *, labelled: bool = True) -> dict[str, str]:
    """The raw columns that a schema reads, each with the configuration key that names it.

    Those of `labelled` rows are for training and evaluation; others need neither label nor timestamp.
    """
    keys = {schema.label: "features.label"} if labelled else {}
    if schema.timestamp and labelled:
        keys.setdefault(schema.timestamp, "features.timestamp")
    for field in schema.fields:
        keys.setdefault(field.column, f"features.fields, `column` of {field.name!r}")
    return keys


def check_columns(path: str, columns: ColumnKeys) -> None:
    """Raises DataError unless the file has all the columns; reads no rows."""
    if is_csv(path):
        _require(columns, _csv_names(path), path)
        return
    with _reading(path), _parquet(path) as file:
        _require(columns, file.schema_arrow.names, path)


def read_row_group(group: RowGroup, columns: Sequence[str] | ColumnKeys) -> pa.Table:
    """One Parquet row group.

    Raises:
        DataError: a column is missing, the file is damaged, or it is CSV, which has no row groups.
    """
    if is_csv(group.path):
        raise DataError(f"{group.path}: CSV cannot be read by row group; use `data.encode: prepared`")
    with _reading(group.where), _parquet(group.path) as file:
        _require(columns, file.schema_arrow.names, group.path)
        return file.read_row_group(group.index, columns=list(columns), use_threads=False)


def iter_tables(group: RowGroup, schema: Schema, *, labelled: bool = True) -> Iterator[pa.Table]:
    """Streams the columns of a schema (see `column_keys`) in tables of bounded size, in order of rows.

    Raises:
        DataError: a column is missing, the file is damaged, or a CSV cell is not of its type.
    """
    columns = column_keys(schema, labelled=labelled)
    if is_csv(group.path):
        yield from _csv_tables(group.path, schema, columns)
        return
    with _reading(group.where), _parquet(group.path) as file:
        _require(columns, file.schema_arrow.names, group.path)
        for batch in file.iter_batches(
            BATCH_ROWS, row_groups=[group.index], columns=list(columns), use_threads=False
        ):
            yield pa.Table.from_batches([batch])


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    filesystem, path = fsspec.core.url_to_fs(pattern)
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


def _text_suffix(path: str) -> str:
    name = PurePath(path.lower())
    return PurePath(name.stem).suffix if name.suffix in _COMPRESSIONS else name.suffix


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Says which file it was when Arrow or the system cannot read it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{where}: cannot be read; it may be truncated, damaged or of another format: {error}"
        ) from error


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    if "://" not in path:
        with pq.ParquetFile(path) as file:
            yield file
        return
    with fsspec.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        yield file


def _require(columns: Collection[str] | ColumnKeys, existing: Sequence[str], path: str) -> None:
    for column in columns:
        if column not in existing:
            key = f" (`{columns[column]}`)" if isinstance(columns, Mapping) else ""
            raise DataError(
                f"{path}: no column {column!r}{key}; the file has: {', '.join(existing)}. "
                "Name one of these in the configuration, or write the column"
            )


def _csv_tables(path: str, schema: Schema, columns: ColumnKeys) -> Iterator[pa.Table]:
    _require(columns, _csv_names(path), path)
    lists = {field.column for field in schema.fields if field.is_list}
    for batch in _csv_batches(path, list(columns), _csv_types(schema)):
        arrays = [
            pc.split_pattern(array, LIST_SEPARATOR) if name in lists else array
            for name, array in zip(batch.schema.names, batch.columns, strict=True)
        ]
        yield pa.table(arrays, batch.schema.names)


def _csv_types(schema: Schema) -> dict[str, pa.DataType]:
    types = {schema.label: pa.float64()}
    for field in schema.fields:
        types[field.column] = pa.float64() if field.kind == "numeric" else pa.string()
    if schema.timestamp:
        types[schema.timestamp] = pa.int64()
    return types


def _csv_names(path: str) -> list[str]:
    with _reading(path), _csv_reader(path, [], {}) as reader:
        names: list[str] = reader.schema.names
        return names


def _count_csv_rows(path: str) -> int:
    first = _csv_names(path)[0]
    # Bytes hold whatever the column holds.
    return sum(batch.num_rows for batch in _csv_batches(path, [first], {first: pa.binary()}))


def _csv_batches(path: str, columns: list[str], types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    try:
        with _csv_reader(path, columns, types) as reader:
            yield from reader
    except OSError as error:
        raise DataError(f"{path}: cannot be read; it may be truncated or damaged: {error}") from error
    except pa.ArrowInvalid as error:
        names = _csv_names(path)
        message = re.sub(r"CSV column #(\d+)", lambda match: f"column {names[int(match[1])]!r}", str(error))
        raise DataError(f"{path}: {message}") from error


@contextmanager
def _csv_reader(
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
            source = stack.enter_context(fsspec.open(path, "rb", compression="infer"))
        yield stack.enter_context(pa.csv.open_csv(source, **options))
