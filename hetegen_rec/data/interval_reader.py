"""Reads intervals of row groups as encoded rows; what cannot be used is an error, or left out."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.errors import DataError, PreparedAnewError
from hetegen_rec.data.raw import RowGroup, read_row_group
from hetegen_rec.data.row_plan import Interval, Window

logger = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[pa.Table, int, str], pa.Table]
"""Raw rows, the index of the first one in its split, and their place for errors -> encoded rows."""


@dataclass(frozen=True)
class SkippedRows:
    """Rows that could not be used and were left out, each time that they were to be read."""

    where: str
    """File, row group and rows."""
    num_rows: int
    reason: str


class SkipLog:
    """The rows that a reader left out. Each row group is warned of once."""

    def __init__(self) -> None:
        self.rows: list[SkippedRows] = []
        self._warned: set[RowGroup] = set()

    def add(self, interval: Interval, reason: str) -> None:
        """Notes that the rows of an interval were left out."""
        self.rows.append(SkippedRows(interval.where, interval.num_rows, reason))
        if interval.group not in self._warned:
            self._warned.add(interval.group)
            logger.warning("rows skipped (`data.on_bad_shard: skip`): %s", reason)


class IntervalReader:
    """Encoded rows of intervals and windows, for one pass over the data."""

    def __init__(
        self,
        batcher: Batcher,
        columns: Sequence[str],
        encode: Encode | None,
        *,
        skips: SkipLog | None,
        most_skipped: int,
        abandoned: Event,
    ) -> None:
        """Reads nothing yet.

        Args:
            batcher: what the rows have to fit.
            columns: columns to read from the row groups.
            encode: encodes rows as they are read; None for encoded shards.
            skips: where to note rows that are left out; None makes them an error.
            most_skipped: rows that may be left out in all before it is an error nevertheless.
            abandoned: set when nobody waits for the rows any more.
        """
        self._batcher, self._columns, self._encode = batcher, columns, encode
        self._skips, self._most_skipped, self._num_skipped = skips, most_skipped, 0
        self._abandoned = abandoned
        # By lane: a row group that reaches over the end of a window is not read twice.
        self._groups: dict[int, tuple[RowGroup, pa.Table]] = {}

    def read(self, window: Window, lane: int) -> pa.Table:
        """The encoded rows of a window, in the order to hand them out; padding for rows left out.

        Raises:
            DataError: rows cannot be read or encoded, or too many were left out.
        """
        table = pa.concat_tables([self._read_interval(interval, lane) for interval in window.intervals])
        if window.order is None:
            return table
        assert table.num_rows == len(window.order)  # so that no index of the order needs to be checked
        indices = pa.array(window.order)
        # Column by column, so that only one column is held a third time.
        columns = [pc.take(column.combine_chunks(), indices, boundscheck=False) for column in table.columns]
        return pa.table(columns, schema=table.schema)

    def _read_interval(self, interval: Interval, lane: int) -> pa.Table:
        if self._abandoned.is_set():
            raise _AbandonedError
        try:
            return self._read_valid(interval, lane)
        except PreparedAnewError:
            raise
        except DataError as error:
            if self._skips is None:
                raise
            self._num_skipped += interval.num_rows
            if self._num_skipped > self._most_skipped:
                raise DataError(
                    f"{error}. With these, more than half of a rank's rows in this epoch were skipped "
                    "(`data.on_bad_shard: skip`), which is no training on the data: mend them"
                ) from error
            self._skips.add(interval, str(error))
            return self._batcher.padding(interval.num_rows)

    def _read_valid(self, interval: Interval, lane: int) -> pa.Table:
        try:
            rows = self._read_group(interval.group, lane).slice(interval.start, interval.num_rows)
            if self._encode is not None:
                rows = self._encode(rows, interval.group.first_row + interval.start, interval.where)
            return self._batcher.conform(rows, interval.where)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"{interval.where}: cannot be used; the file is damaged or of another schema: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _read_group(self, group: RowGroup, lane: int) -> pa.Table:
        held = self._groups.pop(lane, None)  # and freed before the next one is read
        table = held[1] if held and held[0] == group else None
        del held
        if table is None:
            table = read_row_group(group, self._columns)
        self._groups[lane] = group, table
        return table


class _AbandonedError(Exception):
    """Nobody waits for the rows any more; it ends the reading thread and goes no further."""
