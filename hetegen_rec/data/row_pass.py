"""One pass over raw rows: every rank reads its own contiguous share of the row groups."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.raw import BadRowsError, RowGroup, iter_tables
from hetegen_rec.data.workers import Workers

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of rank 0's work: the phase, its rows done, its rows in all."""
Use: TypeAlias = Callable[[pa.Table, int, str], None]
"""Takes in raw rows: a table, the index of its first row in the split, and its place for errors. Takes
in all of them, or raises BadRowsError."""
BadGroup: TypeAlias = tuple[RowGroup, str]
"""A row group that cannot be used, and why."""


def silent(phase: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class RowPass:
    """How to go over rows.

    Stopping at the first bad row, rows come in tables of bounded size. Skipping, each row group comes in
    one table, so that it is taken in as a whole or not at all.
    """

    schema: Schema
    workers: Workers
    progress: Progress
    labelled: bool = True
    """Whether to read label and timestamp."""
    skip: bool = False
    """Whether to go on after a row group that cannot be used."""

    def read(self, groups: Sequence[RowGroup], phase: str, use: Use) -> list[BadGroup]:
        """Hands this rank's share of the rows to `use`; returns the row groups that were skipped.

        Raises:
            BadRowsError: rows cannot be read or used, and bad ones are not skipped.
        """
        share = _share(groups, self.workers)
        total, done = num_rows_of(share), 0
        if self.workers.rank == 0:
            logger.info("%s: %d rows over %d rank(s)", phase, num_rows_of(groups), self.workers.world_size)
        bad: list[BadGroup] = []
        for group in share:
            try:
                for table, first_row in self._tables(group):
                    use(table, first_row, group.where)
                    if self.workers.rank == 0:
                        self.progress(phase, done + first_row - group.first_row + len(table), total)
            except BadRowsError as error:
                if not self.skip:
                    raise
                bad.append((group, str(error)))
            done += group.num_rows
        return bad

    def _tables(self, group: RowGroup) -> Iterator[tuple[pa.Table, int]]:
        tables = iter_tables(group, self.schema, labelled=self.labelled)
        if self.skip:
            yield pa.concat_tables(tables), group.first_row
            return
        first_row = group.first_row
        for table in tables:
            yield table, first_row
            first_row += len(table)


def num_rows_of(groups: Sequence[RowGroup]) -> int:
    """Rows of row groups."""
    return sum(group.num_rows for group in groups)


def _share(groups: Sequence[RowGroup], workers: Workers) -> list[RowGroup]:
    """This rank's contiguous share of the rows, cut between row groups; may be empty."""
    total = groups[-1].first_row + groups[-1].num_rows

    def rank_of(group: RowGroup) -> int:
        middle = group.first_row + group.num_rows // 2
        return middle * workers.world_size // total

    return [group for group in groups if rank_of(group) == workers.rank]
