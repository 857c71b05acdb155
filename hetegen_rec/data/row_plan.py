"""Which rows of an epoch go where, and in what order: arithmetic on row counts, no data is read.

An epoch is one sequence of all rows of a split, cut into *lanes* of equally many rows. Lanes, not
ranks, own positions: a rank reads one or several whole lanes, so that the same lanes on 1, 2 or 4
ranks make the same batches, and a position within the lanes is all that a resume needs.

With shuffling, the row groups are permuted and the sequence starts at a random row of theirs (a
ring), both by (seed, epoch); within a lane, rows are then shuffled inside *windows* of fixed size.
Every window can be computed from its index alone, so a reader starts anywhere without reading what
lies before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.data.raw import DataError, RowGroup


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


@dataclass(frozen=True)
class Window:
    """Consecutive rows of a lane that are read, and shuffled, together."""

    intervals: tuple[Interval, ...]
    num_padding: int
    """Padding rows behind the real ones."""
    order: NDArray[np.int64] | None
    """The order in which to hand out the rows of the intervals; None keeps theirs."""


class RowPlan:
    """One epoch's rows, cut into lanes and windows.

    In training the `N % num_lanes` rows that do not fill a lane are left out of the epoch: others in
    every epoch when shuffled, the last ones of the split when not. With `pad` no row is left out and
    the end of the sequence is filled with padding rows instead.
    """

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        *,
        num_lanes: int,
        seed: int,
        epoch: int,
        shuffle: bool,
        window_rows: int,
        pad: bool,
    ):
        """Plans one epoch; a pure function of its arguments.

        Args:
            row_groups: all row groups of the split; empty ones are fine.
            num_lanes: equal shares to cut the epoch into.
            seed: of the shuffle.
            epoch: of the shuffle, from 0.
            shuffle: whether to shuffle at all.
            window_rows: rows of a lane that are read, and shuffled, together.
            pad: keep every row and pad the last lanes (evaluation), instead of leaving out the
                remainder (training).

        Raises:
            DataError: no rows at all, or without `pad` fewer rows than lanes.
        """
        groups = [group for group in row_groups if group.num_rows]
        total = sum(group.num_rows for group in groups)
        _check_enough_rows(total, num_lanes, row_groups, pad)
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle
        self._offset = 0
        if shuffle:
            generator = np.random.default_rng(np.random.SeedSequence((seed, epoch)))
            groups = [groups[i] for i in generator.permutation(len(groups))]
            self._offset = int(generator.integers(total))
        self._groups = groups
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.num_lanes = num_lanes
        self.num_rows = total
        self.rows_per_lane = -(-total // num_lanes) if pad else total // num_lanes
        self.window_rows = min(window_rows, self.rows_per_lane)

    @property
    def num_windows(self) -> int:
        """Windows of each lane."""
        return -(-self.rows_per_lane // self.window_rows)

    def window(self, lane: int, index: int) -> Window:
        """The `index`-th window of a lane: its positions from `index * window_rows` on."""
        start = index * self.window_rows
        stop = min(start + self.window_rows, self.rows_per_lane)
        base = lane * self.rows_per_lane
        first, last = (min(base + position, self.num_rows) for position in (start, stop))
        order = None
        if self._shuffle:
            source = np.random.SeedSequence((self._seed, self._epoch), spawn_key=(lane, index))
            order = np.random.default_rng(source).permutation(last - first)
        return Window(tuple(self._ring(first, last)), stop - start - (last - first), order)

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


def _check_enough_rows(total: int, num_lanes: int, row_groups: Sequence[RowGroup], pad: bool) -> None:
    files = sorted({group.path for group in row_groups})
    where = f"{files[0]} (of {len(files)} file(s))" if files else "the split"
    if total == 0:
        raise DataError(f"{where}: no rows to read; check the paths under `data`")
    if total < num_lanes and not pad:
        raise DataError(
            f"{where}: {total} row(s) cannot be shared by {num_lanes} lanes (one a rank unless "
            "`data.lanes` is set); use fewer ranks or more data"
        )
