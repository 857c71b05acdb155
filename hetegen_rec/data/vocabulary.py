"""From values to ids: the three kinds of vocabulary.

Every table starts with the reserved ids 0 (missing) and 1 (out of vocabulary); values follow.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hetegen_rec.config.schema import NUM_RESERVED_IDS, ReservedId
from hetegen_rec.data.hashing import UInt64Array, hash_bucket, hash_strings, mix64, salt_of

Ids = npt.NDArray[np.int32]
_ABSENT = -1
_KEPT_KEY = b"num_kept"


class Vocabulary(Protocol):
    """Maps values of one table to ids."""

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        ...

    def lookup(self, values: pa.Array) -> Ids:
        """[len(values)] ids of values (no nulls, of the vocabulary's type); 1 where unknown."""
        ...


def hash_values(values: pa.Array, salt: int) -> UInt64Array:
    """64-bit hashes of int64, float64 (by their bits) or large_string values without nulls."""
    if pa.types.is_null(values.type):
        return np.empty(0, np.uint64)
    if pa.types.is_large_string(values.type):
        return hash_strings(values, salt)
    return mix64(values.to_numpy(zero_copy_only=False).view(np.int64), salt)


class ExactVocabulary:
    """Every distinct training value of a table, most frequent first; the frequent enough have ids.

    Args:
        values: distinct values in order of id; those behind the first `num_kept` are out of
            vocabulary, yet their counts are known.
        counts: training occurrences over all fields on the table.
        rows: training occurrences in the field that owns the table.
        num_kept: how many of the values have an id.
    """

    def __init__(
        self,
        values: pa.Array,
        counts: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        num_kept: int,
    ) -> None:
        self.values = values
        self.counts = counts
        self.rows = rows
        self.num_kept = num_kept
        self._salt, keys = _distinct_keys(values)
        self._order = np.argsort(keys)
        self._sorted_keys = keys[self._order]

    @classmethod
    def build(cls, counts: Mapping[str, pa.Table], owner: str, min_count: int) -> "ExactVocabulary":
        """Merges the value counts of the fields on a table.

        Args:
            counts: by field, a table with columns `value` and `count`.
            owner: the field that owns the table.
            min_count: values seen less often, over all the fields, get no id.
        """
        typed = [table for table in counts.values() if not pa.types.is_null(table.schema.field("value").type)]
        if not typed:
            return cls(pa.nulls(0), np.empty(0, np.int64), np.empty(0, np.int64), 0)
        stacked = []
        for field, table in counts.items():
            rows = table["count"] if field == owner else pa.array(np.zeros(len(table), np.int64))
            columns = [table["value"].cast(typed[0].schema.field("value").type), table["count"], rows]
            stacked.append(pa.table(columns, ["value", "count", "rows"]))
        merged = pa.concat_tables(stacked).group_by("value").aggregate([("count", "sum"), ("rows", "sum")])
        merged = merged.sort_by([("count_sum", "descending"), ("value", "ascending")])
        totals = merged["count_sum"].to_numpy()
        return cls(
            merged["value"].combine_chunks(),
            totals,
            merged["rows_sum"].to_numpy(),
            int((totals >= min_count).sum()),
        )

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + self.num_kept

    def lookup(self, values: pa.Array) -> Ids:
        """Ids of values; 1 for those unknown or too rare."""
        return self.ids_of(self.positions(values))

    def ids_of(self, positions: npt.NDArray[np.int64]) -> Ids:
        """Ids of what `positions` returned."""
        known = (positions != _ABSENT) & (positions < self.num_kept)
        return np.where(known, positions + NUM_RESERVED_IDS, ReservedId.OUT_OF_VOCABULARY).astype(np.int32)

    def rows_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Training rows of the owner's values; 0 for unknown ones."""
        if not len(self.rows):
            return np.zeros(len(positions), np.int64)
        return np.where(positions == _ABSENT, 0, self.rows[positions])

    def positions(self, values: pa.Array) -> npt.NDArray[np.int64]:
        """Places of the values in `self.values`; -1 for unknown ones."""
        if not len(self.values) or not len(values):
            return np.full(len(values), _ABSENT, np.int64)
        keys = hash_values(values, self._salt)
        places = np.minimum(np.searchsorted(self._sorted_keys, keys), len(self._order) - 1)
        positions = np.where(self._sorted_keys[places] == keys, self._order[places], _ABSENT)
        if pa.types.is_large_string(values.type):
            # Equal hashes are not equal strings: compare, so that the vocabulary is exact.
            found = np.flatnonzero(positions != _ABSENT)
            same = pc.equal(self.values.take(pa.array(positions[found])), values.take(pa.array(found)))
            positions[found[~same.to_numpy(zero_copy_only=False)]] = _ABSENT
        return positions

    @property
    def checksum(self) -> str:
        """Identifies the values, their order and their counts."""
        digest = hashlib.sha256(f"{self.values.type} {self.num_kept}".encode())
        for array in (hash_values(self.values, self._salt), self.counts, self.rows):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes Parquet with columns `value`, `count`, `rows`; an id is the row's index plus 2."""
        table = pa.table([self.values, self.counts, self.rows], ["value", "count", "rows"])
        table = table.replace_schema_metadata({_KEPT_KEY: str(self.num_kept).encode()})
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "ExactVocabulary":
        """Reads what `save` wrote."""
        table = pq.read_table(path)
        counts, rows = table["count"].to_numpy(), table["rows"].to_numpy()
        num_kept = int(table.schema.metadata[_KEPT_KEY])
        return cls(_one_array(table["value"]), counts, rows, num_kept)


class HashVocabulary:
    """A fixed number of ids; values share one by their salted hash. There is no unknown value."""

    def __init__(self, table: str, hash_size: int) -> None:
        self._salt = salt_of(table)
        self._hash_size = hash_size

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + self._hash_size

    def lookup(self, values: pa.Array) -> Ids:
        """Ids of values: 2 + hash modulo the size."""
        buckets = hash_bucket(hash_values(values, self._salt), self._hash_size)
        return (buckets + NUM_RESERVED_IDS).astype(np.int32)


class BucketVocabulary:
    """Intervals of numbers: a value's bucket is the number of edges that are not above it."""

    def __init__(self, edges: npt.NDArray[np.float64]) -> None:
        self._edges = edges

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + len(self._edges) + 1

    def lookup(self, values: pa.Array) -> Ids:
        """Ids of numbers. Every number has a bucket."""
        if not len(values):
            return np.empty(0, np.int32)
        numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return (np.searchsorted(self._edges, numbers, side="right") + NUM_RESERVED_IDS).astype(np.int32)


def _distinct_keys(values: pa.Array) -> tuple[int, UInt64Array]:
    """The first salt under which no two values share a hash, and the hashes. Almost always 0."""
    salt = 0
    while True:
        keys = hash_values(values, salt)
        if len(np.unique(keys)) == len(keys):
            return salt, keys
        salt += 1


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    return column.combine_chunks()
