"""Where a reader stands in the training rows: a history of lanes that outlives every number of ranks."""

from dataclasses import dataclass, replace
from typing import Any

from hetegen_rec.data.errors import DataError


@dataclass(frozen=True)
class Served:
    """What was handed out of an epoch while it was cut into the same lanes."""

    num_lanes: int
    rows_per_lane: int
    """Rows, padding included, that each of the lanes handed out."""


@dataclass(frozen=True)
class Cursor:
    """Position of a reader behind a batch.

    An epoch begins on some number of lanes. A restart on another number cuts the rows that are left
    into new lanes, and so on: the cursor is the history of it, from which the position follows by
    arithmetic. It is the same on every rank.
    """

    epoch: int = 0
    served: tuple[Served, ...] = ()
    """One entry for every cut of this epoch, in order; empty at its beginning."""

    @property
    def rows_per_lane(self) -> int:
        """Rows that a lane handed out in this epoch, over all cuts: greater after every batch."""
        return sum(entry.rows_per_lane for entry in self.served)

    def on_lanes(self, num_lanes: int) -> "Cursor":
        """The same position, its last entry on `num_lanes` lanes: added if the epoch was not cut so before.

        Cuts of which nothing was handed out are forgotten, so a restart that failed leaves no trace.
        """
        served = tuple(entry for entry in self.served if entry.rows_per_lane)
        if not served or served[-1].num_lanes != num_lanes:
            served = (*served, Served(num_lanes, 0))
        return replace(self, served=served)

    def advanced(self, rows_per_lane: int) -> "Cursor":
        """The position behind so many more rows of each lane of the last entry."""
        *before, last = self.served
        return replace(self, served=(*before, Served(last.num_lanes, last.rows_per_lane + rows_per_lane)))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        served = [{"lanes": entry.num_lanes, "rows_per_lane": entry.rows_per_lane} for entry in self.served]
        return {"epoch": self.epoch, "served": served}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Cursor":
        """The cursor that `as_json` wrote.

        Raises:
            DataError: the values are not those of a cursor.
        """
        try:
            entries = [(int(entry["lanes"]), int(entry["rows_per_lane"])) for entry in values["served"]]
            epoch = int(values["epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise _not_a_cursor(values) from error
        if epoch < 0 or any(num_lanes < 1 or rows < 0 for num_lanes, rows in entries):
            raise _not_a_cursor(values)
        return cls(epoch, tuple(Served(*entry) for entry in entries))


def _not_a_cursor(values: object) -> DataError:
    return DataError(f"{values!r} is no position in the training rows; take another checkpoint")
