"""How long ago training has last seen each id (FeSAIL, arXiv 2505.02844, equation 1).

The staleness of an id is 0 if the newest period's own rows hold it, and otherwise one more than it was. An id
stands for a row of an embedding table, so it is seen wherever it is looked up: an item as a target or in a
history (derived). Replayed rows do not count as the period's own. Reserved ids are never stale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.statistics import Statistics

Seen: TypeAlias = dict[str, NDArray[np.bool_]]
"""By table, [num_ids] whether each id was seen."""

_LONGEST = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class IdCells:
    """The ids of one field in some rows, reserved ones left out."""

    table: str
    rows: NDArray[np.int64]
    """[N] the row of each id, counted from 0."""
    ids: NDArray[np.int32]
    """[N]"""


class Staleness:
    """By table, how many periods ago each id was last seen."""

    def __init__(self, by_table: Mapping[str, NDArray[np.uint16]]) -> None:
        """Takes over what is known.

        Args:
            by_table: [num_ids] a table; ids behind its end are of staleness 0.
        """
        self.by_table = dict(by_table)

    def after(self, seen: Seen) -> "Staleness":
        """The staleness after one more period.

        Args:
            seen: what the period's own rows hold, of every id that there is by now.
        """
        return Staleness({table: _after(self._of(table, len(here)), here) for table, here in seen.items()})

    def factors(self, statistics: Statistics, regularisation: float) -> dict[str, NDArray[np.float32]]:
        """By table, [num_ids] what share of its movement the row of an id keeps: 1 / (1 + lambda s).

        Args:
            statistics: of the training rows, which may have ids that were unknown when staleness was counted.
            regularisation: lambda.
        """
        sizes = {table: statistics.table_rows(table) for table in statistics.table_identities}
        stale = {table: self._of(table, num_ids).astype(np.float32) for table, num_ids in sizes.items()}
        return {table: 1.0 / (1.0 + np.float32(regularisation) * ages) for table, ages in stale.items()}

    def save(self, directory: Path) -> None:
        """Writes one array a table into a directory, which is made."""
        directory.mkdir(parents=True)
        for table, ages in self.by_table.items():
            np.save(directory / f"{table}.npy", ages)

    @classmethod
    def load(cls, directory: str | Path) -> "Staleness":
        """Reads what `save` wrote.

        Raises:
            DataError: there is nothing of that kind.
        """
        paths = sorted(Path(directory).glob("*.npy"))
        if not paths:
            raise DataError(
                f"{directory}: holds no staleness of ids; name a directory that `incremental` wrote"
            )
        return cls({path.stem: np.load(path) for path in paths})

    def _of(self, table: str, num_ids: int) -> NDArray[np.uint16]:
        ages = np.zeros(num_ids, np.uint16)
        known = self.by_table.get(table, ages)[:num_ids]
        ages[: len(known)] = known
        return ages


def nothing_seen(statistics: Statistics) -> Seen:
    """Tables of which no id was seen."""
    return {table: np.zeros(statistics.table_rows(table), bool) for table in statistics.table_identities}


def id_cells(encoded: pa.Table, schema: Schema) -> Iterator[IdCells]:
    """The ids of an encoded table, field by field."""
    for field in schema.fields:
        column = encoded.column(field.name).combine_chunks()
        rows = np.arange(len(column))
        if field.is_list:
            rows = np.repeat(rows, column.value_lengths().to_numpy())
            column = column.flatten()
        ids = column.to_numpy()
        own = ids >= NUM_RESERVED_IDS
        yield IdCells(field.table_name, rows[own], ids[own])


def _after(ages: NDArray[np.uint16], seen: NDArray[np.bool_]) -> NDArray[np.uint16]:
    older = np.where(seen, 0, np.minimum(ages, _LONGEST - 1) + 1).astype(np.uint16)
    older[:NUM_RESERVED_IDS] = 0
    return older
