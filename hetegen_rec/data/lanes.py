"""Equal shares of a sequence of rows, cut anew as often as needed: arithmetic on ranges.

A sequence of rows is a list of ranges of *places*; what a place stands for is the row plan's matter.
Lanes hand out their shares side by side. When the rest is to be handed out on another number of lanes,
what is left of each lane, one after the other, is the sequence that the new lanes share. The cost
grows with the number of lanes and of cuts, never with rows.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.data.cursor import Served
from hetegen_rec.data.errors import DataError


class Lanes:
    """A sequence of rows in equal lanes; padding behind the last rows makes them equal."""

    def __init__(self, rows: Sequence[range], num_lanes: int) -> None:
        self._rows = [run for run in rows if run]
        self._ends = np.cumsum([len(run) for run in self._rows], dtype=np.int64)
        self.num_lanes = num_lanes
        self.num_rows = int(self._ends[-1]) if self._rows else 0
        """Rows of the sequence, without padding."""
        self.rows_per_lane = -(-self.num_rows // num_lanes)
        """Rows that each lane hands out, padding included."""

    def share(self, lane: int, start: int = 0) -> list[range]:
        """The places of a lane's rows from its position `start` on, without padding."""
        first = lane * self.rows_per_lane
        return self._between(
            min(first + start, self.num_rows), min(first + self.rows_per_lane, self.num_rows)
        )

    def rest(self, rows_per_lane: int) -> list[range]:
        """What is left when every lane has handed out so many rows: the lanes' rests, one after the other."""
        return [run for lane in range(self.num_lanes) for run in self.share(lane, rows_per_lane)]

    def real_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """[lanes]: rows that are no padding among the positions `start` to `stop` of each lane."""
        firsts = np.arange(self.num_lanes) * self.rows_per_lane
        real = np.clip(self.num_rows - firsts, 0, self.rows_per_lane)
        counts: NDArray[np.int64] = np.clip(real, start, stop) - start
        return counts

    def _between(self, start: int, stop: int) -> list[range]:
        runs = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            run, end = self._rows[index], int(self._ends[index])
            first = end - len(run)
            runs.append(run[start - first : stop - first])
            start, index = end, index + 1
        return runs


def cut(num_rows: int, served: Sequence[Served]) -> Lanes:
    """The lanes of the last entry, of at least one: they share what the entries before it left.

    Raises:
        DataError: an entry has handed out more rows than its lanes have.
    """
    lanes = Lanes([range(num_rows)], served[0].num_lanes)
    _check_within(lanes, served[0])
    for before, entry in pairwise(served):
        lanes = Lanes(lanes.rest(before.rows_per_lane), entry.num_lanes)
        _check_within(lanes, entry)
    return lanes


def _check_within(lanes: Lanes, served: Served) -> None:
    if served.rows_per_lane > lanes.rows_per_lane:
        raise DataError(
            f"the training rows have changed: the checkpoint stands at row {served.rows_per_lane} of each of "
            f"{served.num_lanes} lanes, but these have {lanes.rows_per_lane} rows now; restore the data that "
            "it was trained on, or start anew"
        )
