"""Which rows of an epoch go where, and in what order: arithmetic on row counts, no data is read.

An epoch is one sequence of all rows of a split, cut into *lanes* of equally many rows; the last lanes
end in padding where the rows do not fill them. Lanes, not ranks, own positions: a rank reads one or
several whole lanes, so that the same lanes on 1, 2 or 4 ranks make the same batches, and a position
within the lanes is all that a restart needs.

With shuffling, the row groups are permuted and the sequence starts at a random row of theirs (a
ring), both by (seed, epoch); within a lane, rows are then shuffled inside *windows* of fixed size.
Every window can be computed from its index alone, so a reader starts anywhere without reading what
lies before.

The lanes with which an epoch begins fix its order for good. A *place* is a row's rank in it: lane after
lane, each in the order in which it hands out. After a restart on another number of lanes the rows that
are left are shared out by place (`lanes`), and reading a range of places is reading slices of the
windows of the beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.lanes import cut
from hetegen_rec.data.raw import RowGroup


@dataclass(frozen=True)
class Interval:
    """Rows `start` (included) to `stop` (excluded) of one row group."""

    group: RowGroup
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the interval."""
        return self.stop - self.start

    @property
    def where(self) -> str:
        """Its place, for errors."""
        return f"{self.group.where}, rows {self.start} to {self.stop}"


@dataclass(frozen=True)
class Window:
    """Rows that are read, and shuffled, together."""

    intervals: tuple[Interval, ...]
    order: NDArray[np.int64] | None
    """The order in which to hand out the rows of the intervals; None keeps theirs."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a lane's share: a slice of one window, or padding."""

    window: tuple[int, int] | None
    """Lane and index of the window, see `RowPlan.window`; None for padding."""
    start: int
    """First row of the slice, in the window's order."""
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the piece."""
        return self.stop - self.start


class RowPlan:
    """One epoch's rows, cut into lanes, and their windows."""

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        cursor: Cursor,
        *,
        seed: int,
        shuffle: bool,
        window_rows: int,
    ) -> None:
        """Plans one epoch; a pure function of its arguments.

        Args:
            row_groups: all row groups of the split; empty ones are fine.
            cursor: the epoch, and the lanes on which it was and is read: `Cursor.on_lanes`.
            seed: of the shuffle.
            shuffle: whether to shuffle at all.
            window_rows: rows of a lane that are read, and shuffled, together.

        Raises:
            DataError: no rows at all, or fewer than were handed out already.
        """
        groups = [group for group in row_groups if group.num_rows]
        total = sum(group.num_rows for group in groups)
        if total == 0:
            raise DataError(f"{split_of(row_groups)}: no rows to read; check the paths under `data`")
        self._seed, self._epoch, self._shuffle = seed, cursor.epoch, shuffle
        self._offset = 0
        if shuffle:
            generator = np.random.default_rng(np.random.SeedSequence((seed, cursor.epoch)))
            groups = [groups[i] for i in generator.permutation(len(groups))]
            self._offset = int(generator.integers(total))
        self._groups = groups
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self._first_lane_rows = -(-total // cursor.served[0].num_lanes)
        self._window_rows = min(window_rows, self._first_lane_rows)
        self.num_rows = total
        """Rows of the split."""
        self.lanes = cut(total, cursor.served)
        """Those of the cursor's last entry; the ranges of their shares are places."""

    def pieces(self, lane: int, start: int = 0) -> Iterator[Piece]:
        """What a lane hands out from its position `start` on, padding last."""
        num_rows = 0
        for places in self.lanes.share(lane, start):
            yield from self._slices(places)
            num_rows += len(places)
        padding = self.lanes.rows_per_lane - start - num_rows
        if padding:
            yield Piece(None, 0, padding)

    def window(self, lane: int, index: int) -> Window:
        """The `index`-th window of a lane of the epoch's beginning."""
        first, last = self._window_places(lane, index)
        order = None
        if self._shuffle:
            source = np.random.SeedSequence((self._seed, self._epoch), spawn_key=(lane, index))
            order = np.random.default_rng(source).permutation(last - first)
        return Window(tuple(self._ring(first, last)), order)

    def _slices(self, places: range) -> Iterator[Piece]:
        """The slices of windows that places stand for, in order."""
        place = places.start
        while place < places.stop:
            lane, position = divmod(place, self._first_lane_rows)
            index = position // self._window_rows
            first, last = self._window_places(lane, index)
            stop = min(last, places.stop)
            yield Piece((lane, index), place - first, stop - first)
            place = stop

    def _window_places(self, lane: int, index: int) -> tuple[int, int]:
        base, start = lane * self._first_lane_rows, index * self._window_rows
        stop = min(start + self._window_rows, self._first_lane_rows)
        return min(base + start, self.num_rows), min(base + stop, self.num_rows)

    def _ring(self, first: int, last: int) -> list[Interval]:
        """Positions [first, last) of the epoch's sequence, which starts at the ring's offset."""
        if first == last:
            return []
        start = (first + self._offset) % self.num_rows
        stop = start + last - first
        head = self._flat(start, min(stop, self.num_rows))
        return head if stop <= self.num_rows else head + self._flat(0, stop - self.num_rows)

    def _flat(self, start: int, stop: int) -> list[Interval]:
        """Rows [start, stop) of the permuted row groups laid end to end."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        intervals = []
        for index in range(first, last + 1):
            group, end = self._groups[index], int(self._ends[index])
            begin = end - group.num_rows
            intervals.append(Interval(group, max(start - begin, 0), min(stop, end) - begin))
        return intervals


def lanes_of(rank: int, world_size: int, num_lanes: int) -> range:
    """The lanes that a rank reads: consecutive, equally many for every rank.

    Raises:
        ConfigError: the ranks cannot share the lanes equally.
    """
    if num_lanes % world_size:
        raise ConfigError(
            f"`data.lanes: {num_lanes}` cannot be shared equally by {world_size} ranks; "
            f"set it to a multiple of {world_size}, or leave it out for one lane a rank"
        )
    share = num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


def split_of(row_groups: Sequence[RowGroup]) -> str:
    """What an error calls the files of a split."""
    files = sorted({group.path for group in row_groups})
    return f"{files[0]} (of {len(files)} file(s))" if files else "the split"
