"""Rows as the files of one rank, in row groups of one size."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.data.raw import PREPARATION_KEY

GROUPS_PER_PART = 64
"""Row groups of one file."""


class Parts:
    """Rows to files `part-RRRRR-NNNNN.parquet` with row groups of one size.

    Args:
        directory: of the files; it must exist.
        rank: this process.
        rows_per_group: rows of a row group; the last one may have fewer.
        open_file: opens a new file of rows of a schema.
        preparation: what the files carry for `RowGroup.preparation`.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        rows_per_group: int,
        open_file: Callable[[Path, pa.Schema], pq.ParquetWriter],
        preparation: str | None = None,
    ) -> None:
        self._directory = directory
        self._rank = rank
        self._rows_per_group = rows_per_group
        self._open_file = open_file
        self._preparation = preparation
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._num_groups = 0

    def add(self, table: pa.Table) -> None:
        """Takes in rows; writes the row groups that are full."""
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._waiting_rows < self._rows_per_group:
            return
        rows = pa.concat_tables(self._waiting)
        while len(rows) >= self._rows_per_group:
            self._write(rows.slice(0, self._rows_per_group))
            rows = rows.slice(self._rows_per_group)
        self._waiting, self._waiting_rows = [rows], len(rows)

    def close(self) -> None:
        """Writes the rest."""
        if self._waiting_rows:
            self._write(pa.concat_tables(self._waiting))
        if self._writer is not None:
            self._writer.close()

    def _write(self, rows: pa.Table) -> None:
        part, group_in_part = divmod(self._num_groups, GROUPS_PER_PART)
        if group_in_part == 0:
            if self._writer is not None:
                self._writer.close()
            path = self._directory / f"part-{self._rank:05d}-{part:05d}.parquet"
            self._writer = self._open_file(path, rows.schema)
            if self._preparation is not None:
                self._writer.add_key_value_metadata({PREPARATION_KEY: self._preparation})
        assert self._writer is not None
        self._writer.write_table(rows, row_group_size=self._rows_per_group)
        self._num_groups += 1
