"""Raw files: finding them, their shape, and streaming their rows as Arrow tables.

Parquet, and CSV or TSV with a header (by suffix, also compressed as `.gz`, `.bz2`, `.zst`). Paths may
be URLs that fsspec knows, such as `s3://bucket/day=1/*.parquet`.

Damage is noticed where the format lets it be: page checksums of Parquet are verified where the writer
left them (`write_page_checksum=True` in pyarrow), and a row group must hold as many rows as the footer
says. Changed bytes of a page without a checksum may read as other values, which nobody can notice.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config.schema import Field, Schema
from hetegen_rec.data.delimited import count_csv_rows, csv_names, csv_tables, is_csv
from hetegen_rec.data.errors import BadRowsError, DataError, PreparedAnewError
from hetegen_rec.data.opening import ColumnKeys, check_columns, open_parquet, reading

BATCH_ROWS = 65_536
"""Most rows of Parquet held at a time by `iter_tables`."""
PREPARATION_KEY = b"hetegen_rec.preparation"
"""In the metadata of a file of encoded rows: which preparation wrote it."""


@dataclass(frozen=True)
class FileShape:
    """What is known of a raw file without its rows."""

    group_rows: tuple[int, ...]
    """Rows of each row group; of the whole file for CSV."""
    schema: pa.Schema
    """Its columns; of null type for CSV, which knows no types."""
    stamp: str | None
    """See `RowGroup`."""


@dataclass(frozen=True)
class RowGroup:
    """The unit in which raw rows are shared out: a Parquet row group, or a whole CSV file."""

    path: str
    index: int
    """Index of the row group in its file; 0 for CSV."""
    num_rows: int
    first_row: int
    """Index of its first row in the split."""
    stamp: str | None = None
    """Size and time of change of its file when it was listed, which must be the same when it was read; None
    of a URL, and where it may be another."""
    preparation: str | None = None
    """Of encoded rows: what `prepare` wrote into their file, which must be there when it is read."""

    @property
    def next_row(self) -> int:
        """Index of the row behind its last one in the split."""
        return self.first_row + self.num_rows

    @property
    def where(self) -> str:
        """Its place, for errors."""
        return self.path if is_csv(self.path) else f"{self.path}, row group {self.index}"


def expand_paths(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs stand for: sorted within a pattern, patterns in their order.

    A file counts once, by the first of its names.

    Raises:
        DataError: a pattern matches no file, or is a URL that cannot be opened here.
    """
    found: list[str] = []
    for pattern in patterns:
        matches = _glob(pattern)
        if not matches:
            raise DataError(f"no file matches {pattern!r}; check the paths under `data`")
        found += matches
    return list(by_real_path(found).values())


def by_real_path(paths: Iterable[str]) -> dict[str, str]:
    """Paths by the absolute ones without symbolic links; the first of those of one file. URLs as they are."""
    real_directory = lru_cache(maxsize=None)(os.path.realpath)
    found: dict[str, str] = {}
    for path in paths:
        real = path
        if "://" not in path:
            # Most files of a log lie side by side, and to resolve a path is to ask for each of its parts.
            directory, name = os.path.split(path)
            real = os.path.realpath(path) if os.path.islink(path) else f"{real_directory(directory)}/{name}"
        found.setdefault(real, path)
    return found


def read_shape(path: str) -> FileShape:
    """The shape of one file: from the footer of Parquet, by counting lines for CSV.

    Raises:
        BadRowsError: the file cannot be read.
    """
    with reading(path):
        stamp = _stamp(path)
    if is_csv(path):
        names = csv_names(path)
        schema = pa.schema([(name, pa.null()) for name in names])
        return FileShape((count_csv_rows(path, names[0]),), schema, stamp)
    with reading(path), open_parquet(path) as file:
        metadata = file.metadata
        rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return FileShape(rows, file.schema_arrow, stamp)


def row_groups(
    sizes: Sequence[tuple[str, Sequence[int]]], stamps: Mapping[str, str | None] | None = None
) -> list[RowGroup]:
    """The row groups of a split from the `group_rows` of its files, in order; empty ones are left out.

    With `stamps`, by path, files that are written anew later are noticed when they are read.
    """
    groups, first_row = [], 0
    for path, rows_of_groups in sizes:
        for index, num_rows in enumerate(rows_of_groups):
            if num_rows:
                groups.append(RowGroup(path, index, num_rows, first_row, (stamps or {}).get(path)))
            first_row += num_rows
    return groups


def list_row_groups(patterns: Sequence[str]) -> list[RowGroup]:
    """The row groups of all files that the patterns stand for; reads footers only (of Parquet)."""
    return row_groups([(path, read_shape(path).group_rows) for path in expand_paths(patterns)])


def column_keys(
    schema: Schema, *, labelled: bool = True, fields: Iterable[Field] | None = None
) -> dict[str, str]:
    """The raw columns that a schema reads, each with the configuration key that names it.

    Those of `labelled` rows are for training and evaluation; others need neither label nor timestamp. Only
    those of some `fields`, where they are given.
    """
    keys = {schema.label: "features.label"} if labelled else {}
    if schema.timestamp and labelled:
        keys.setdefault(schema.timestamp, "features.timestamp")
    for field in schema.fields if fields is None else fields:
        keys.setdefault(field.column, f"features.fields, `column` of {field.name!r}")
    return keys


def read_row_group(group: RowGroup, columns: Sequence[str] | ColumnKeys) -> pa.Table:
    """One Parquet row group.

    Raises:
        BadRowsError: a column is missing, or the file is damaged or was written anew.
        PreparedAnewError: it is of another preparation.
        DataError: it is CSV, which has no row groups.
    """
    if is_csv(group.path):
        raise DataError(f"{group.path}: CSV cannot be read by row group; use `data.encode: prepared`")
    with reading(group.where), open_parquet(group.path) as file:
        _check_preparation(group, file)
        check_columns(group.path, columns, file.schema_arrow.names)
        table = file.read_row_group(group.index, columns=list(columns), use_threads=False)
    _check_rows(group, len(table))
    _check_stamp(group)
    return table


def iter_tables(group: RowGroup, schema: Schema, *, labelled: bool = True) -> Iterator[pa.Table]:
    """Streams the columns of a schema (see `column_keys`) in tables of bounded size, in order of rows.

    Raises:
        BadRowsError: a column is missing, the file is damaged or was written anew, or a CSV cell is not of
            its type.
    """
    columns = column_keys(schema, labelled=labelled)
    tables = csv_tables(group.path, schema, columns) if is_csv(group.path) else _tables(group, columns)
    num_rows = 0
    for table in tables:
        num_rows += len(table)
        yield table
    _check_rows(group, num_rows)
    _check_stamp(group)


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern, recursive=True))
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise DataError(f"{pattern}: {error}; name paths, or URLs that fsspec can open here") from error
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


def _stamp(path: str) -> str | None:
    if "://" in path:
        return None
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _check_stamp(group: RowGroup) -> None:
    """After reading, because a file may be replaced, or change, while it is read."""
    if group.stamp is None:
        return
    with reading(group.where):
        stamp = _stamp(group.path)
    if stamp != group.stamp:
        raise BadRowsError(
            f"{group.where}: was written anew since the files were listed; start again when nobody changes "
            "the files"
        )


def _check_preparation(group: RowGroup, file: pq.ParquetFile) -> None:
    if group.preparation is None:
        return
    found = (file.metadata.metadata or {}).get(PREPARATION_KEY, b"")
    if found != group.preparation.encode():
        raise PreparedAnewError(group.path)


def _check_rows(group: RowGroup, num_rows: int) -> None:
    if num_rows != group.num_rows:
        raise BadRowsError(
            f"{group.where}: holds {num_rows} rows, but had {group.num_rows} when the files were listed; it "
            "is damaged, or was written anew: start again when nobody changes the files"
        )


def _tables(group: RowGroup, columns: ColumnKeys) -> Iterator[pa.Table]:
    with reading(group.where), open_parquet(group.path) as file:
        check_columns(group.path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(
            BATCH_ROWS, row_groups=[group.index], columns=list(columns), use_threads=False
        ):
            yield pa.Table.from_batches([batch])
