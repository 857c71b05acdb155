"""One pass over raw rows: every rank reads its own contiguous share of the row groups."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import BadRowsError
from hetegen_rec.data.raw import BATCH_ROWS, RowGroup, iter_tables
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
    one table, so that it is taken in as a whole or not at all. Small row groups come together, since
    taking in a table costs as much as a few thousand rows.
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

        def use_and_tell(table: pa.Table, first_row: int, where: str) -> None:
            nonlocal done
            use(table, first_row, where)
            done += len(table)
            if self.workers.rank == 0:
                self.progress(phase, done, total)

        return [bad for block in _blocks(share) for bad in self._use_block(block, use_and_tell)]

    def _use_block(self, block: Sequence[RowGroup], use: Use) -> list[BadGroup]:
        """Hands over row groups in one table, or one by one if that does not work."""
        if len(block) > 1:
            try:
                tables = [table for group in block for table in self._iter(group)]
                if all(table.schema.equals(tables[0].schema) for table in tables):
                    where = f"{block[0].where} to {block[-1].where}"
                    use(pa.concat_tables(tables), block[0].first_row, where)
                    return []
            except BadRowsError as error:
                logger.debug("reading row groups one by one: %s", error)
        return [bad for group in block for bad in self._use_group(group, use)]

    def _use_group(self, group: RowGroup, use: Use) -> list[BadGroup]:
        try:
            if self.skip:
                use(pa.concat_tables(self._iter(group)), group.first_row, group.where)
                return []
            first_row = group.first_row
            for table in self._iter(group):
                use(table, first_row, group.where)
                first_row += len(table)
        except BadRowsError as error:
            if not self.skip:
                raise
            return [(group, str(error))]
        return []

    def _iter(self, group: RowGroup) -> Iterator[pa.Table]:
        return iter_tables(group, self.schema, labelled=self.labelled)


def _blocks(groups: Sequence[RowGroup]) -> Iterator[list[RowGroup]]:
    """Row groups that follow on each other and hold no more rows together than are read at a time."""
    block: list[RowGroup] = []
    for group in groups:
        if block and (
            group.first_row != block[-1].next_row or group.next_row - block[0].first_row > BATCH_ROWS
        ):
            yield block
            block = []
        block.append(group)
    if block:
        yield block


def num_rows_of(groups: Sequence[RowGroup]) -> int:
    """Rows of row groups."""
    return sum(group.num_rows for group in groups)


def _share(groups: Sequence[RowGroup], workers: Workers) -> list[RowGroup]:
    """This rank's contiguous share of the rows, cut between row groups; may be empty."""
    total = groups[-1].next_row

    def rank_of(group: RowGroup) -> int:
        middle = group.first_row + group.num_rows // 2
        return middle * workers.world_size // total

    return [group for group in groups if rank_of(group) == workers.rank]
