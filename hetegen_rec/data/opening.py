"""Opening raw files: what cannot be read is told with its place."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.data.errors import BadRowsError

ColumnKeys: TypeAlias = Mapping[str, str]
"""Columns to read, each with the configuration key that names it."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Context that says which file it was when Arrow or the system cannot read it.

    Args:
        where: the file, or the part of it.

    Raises:
        BadRowsError: it cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise BadRowsError(
            f"{where}: is gone since the files were listed; start again when nobody changes the files"
        ) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadRowsError(
            f"{where}: cannot be read; it may be truncated, damaged or of another format: {one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    """What a library says."""
    return " ".join(str(error).split())


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Context with a file at a path or URL; page checksums are verified where there are any."""
    with ExitStack() as stack:
        source = path
        if "://" in path:
            source = stack.enter_context(fsspec.open(path, "rb"))
        else:
            check_kind(path)
        yield stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))


def check_kind(path: str) -> None:
    """Raises BadRowsError of a path that is no file: to open a pipe would be to wait for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise BadRowsError(f"{path}: is no file; name files, such as those in a directory by `{path}/*`")


def check_columns(path: str, columns: Collection[str] | ColumnKeys, existing: Sequence[str]) -> None:
    """Raises BadRowsError unless each of the columns stands once among the existing ones of a file."""
    times = Counter(existing)
    for column in columns:
        if times[column] == 1:
            continue
        if times[column]:
            raise BadRowsError(f"{path}: holds {times[column]} columns {column!r}; write it with one")
        key = f" (`{columns[column]}`)" if isinstance(columns, Mapping) else ""
        raise BadRowsError(
            f"{path}: no column {column!r}{key}; the file has: {', '.join(existing)}. "
            "Name one of these in the configuration, or write the column"
        )
