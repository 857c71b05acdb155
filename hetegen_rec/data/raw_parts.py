"""Raw rows copied into Parquet files, of which any number of ranks write their own."""

import glob
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.data.parts import Parts

_open_file = partial(pq.ParquetWriter, compression="zstd", write_page_checksum=True)


class RawParts:
    """Raw rows to `DIRECTORY/types-NN/part-RRRRR-NNNNN.parquet`.

    Files of one log may store a column in different types, and one Parquet file can hold only one. So rows of
    each combination of types go to files of their own.
    """

    def __init__(self, directory: Path, rank: int, rows_per_group: int) -> None:
        self._directory = directory
        self._rank = rank
        self._rows_per_group = rows_per_group
        self._by_types: dict[pa.Schema, Parts] = {}
        self.num_rows = 0
        """Rows taken in."""

    def add(self, rows: pa.Table) -> None:
        """Takes in rows; writes the row groups that are full."""
        if not len(rows):
            return
        types = rows.schema.remove_metadata()
        if types not in self._by_types:
            directory = self._directory / f"types-{len(self._by_types):02d}"
            directory.mkdir(parents=True, exist_ok=True)
            self._by_types[types] = Parts(directory, self._rank, self._rows_per_group, _open_file)
        self._by_types[types].add(rows.replace_schema_metadata())
        self.num_rows += len(rows)

    def close(self) -> None:
        """Writes the rest."""
        for parts in self._by_types.values():
            parts.close()


def raw_pattern(directory: Path, inside: str = "") -> str:
    """The glob of all files that `RawParts` of any ranks wrote to a directory.

    Args:
        directory: by its name, whatever that holds.
        inside: a glob of those of its directories that were written to instead, ending in `/`.
    """
    return f"{glob.escape(str(directory))}/{inside}types-*/part-*.parquet"
