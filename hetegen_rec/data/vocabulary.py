"""From values to ids: the three kinds of vocabulary.

Every table starts with the reserved ids 0 (missing) and 1 (out of vocabulary); values follow.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
_VALUES_AT_ONCE = 1 << 20  # while they are digested


@dataclass(frozen=True)
class TableIdentity:
    """Which value each id of a table stands for. Equal for tables whose ids all mean the same."""

    definition: str
    """How the schema makes ids of values."""
    num_ids: int
    """Rows of the table, the reserved ones included."""
    digest: str
    """Of the values in order of id, of the edges, or of the salt."""
    ancestors: tuple[tuple[int, str], ...] = field(default=(), compare=False)
    """`num_ids` and `digest` of the tables whose ids this one kept and added to, the oldest first."""

    def grown_from(self, older: "TableIdentity") -> bool:
        """Whether every id of the older table means the same here, and there are more."""
        return (older.num_ids, older.digest) in self.ancestors

    def after(self, older: "TableIdentity") -> "TableIdentity":
        """This table as one that kept the ids of an older one."""
        if self == older:
            return older
        return replace(self, ancestors=(*older.ancestors, (older.num_ids, older.digest)))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "ancestors": [list(ancestor) for ancestor in self.ancestors]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TableIdentity":
        """The inverse of `as_json`."""
        ancestors = tuple((num_ids, digest) for num_ids, digest in values["ancestors"])
        return cls(**{**values, "ancestors": ancestors})


class Vocabulary(Protocol):
    """Maps values of one table to ids."""

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        ...

    @property
    def digest(self) -> str:
        """Identifies which values each id stands for."""
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

    Where ids of an older vocabulary are kept, its values stand before all others, in their order there,
    whether or not they were seen again.

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
    def build(
        cls, counts: Mapping[str, pa.Table], owner: str, min_count: int, kept: pa.Array | None = None
    ) -> "ExactVocabulary":
        """Merges the value counts of the fields on a table.

        Args:
            counts: by field, a table with columns `value` and `count`.
            owner: the field that owns the table.
            min_count: values seen less often, over all the fields, get no id.
            kept: values of the same type that keep their ids, in order of id.
        """
        merged = _merge_counts(counts, owner)
        num_old = 0 if kept is None else len(kept)
        if num_old:
            merged = _kept_first(merged, kept)
        totals = merged["count"].to_numpy()
        num_kept = num_old + int((totals[num_old:] >= min_count).sum())
        return cls(_one_array(merged["value"]), totals, merged["rows"].to_numpy(), num_kept)

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + self.num_kept

    @property
    def digest(self) -> str:
        """Identifies the values that have ids, and their order."""
        digest = hashlib.sha256()
        for start in range(0, self.num_kept, _VALUES_AT_ONCE):
            part = self.values.slice(start, min(_VALUES_AT_ONCE, self.num_kept - start))
            digest.update(hash_values(part, 0).tobytes())
        return digest.hexdigest()

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

    @staticmethod
    def read_values(path: Path) -> pa.Array:
        """The values with ids, in order of id, of what `save` wrote."""
        table = pq.read_table(path, columns=["value"])
        return _one_array(table["value"].slice(0, int(table.schema.metadata[_KEPT_KEY])))


class HashVocabulary:
    """A fixed number of ids; values share one by their salted hash. There is no unknown value."""

    def __init__(self, table: str, hash_size: int) -> None:
        self._salt = salt_of(table)
        self._hash_size = hash_size

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + self._hash_size

    @property
    def digest(self) -> str:
        """Identifies the salt and the size."""
        return hashlib.sha256(f"{self._salt} {self._hash_size}".encode()).hexdigest()

    def lookup(self, values: pa.Array) -> Ids:
        """Ids of values: 2 + hash modulo the size."""
        buckets = hash_bucket(hash_values(values, self._salt), self._hash_size)
        return (buckets + NUM_RESERVED_IDS).astype(np.int32)


class BucketVocabulary:
    """Intervals of numbers: a value's bucket is the number of edges that are not above it."""

    def __init__(self, edges: npt.NDArray[np.float64]) -> None:
        self.edges = edges

    @property
    def num_ids(self) -> int:
        """Rows of the table, the reserved ones included."""
        return NUM_RESERVED_IDS + len(self.edges) + 1

    @property
    def digest(self) -> str:
        """Identifies the edges."""
        return hashlib.sha256(np.ascontiguousarray(self.edges, np.float64).tobytes()).hexdigest()

    def lookup(self, values: pa.Array) -> Ids:
        """Ids of numbers. Every number has a bucket."""
        if not len(values):
            return np.empty(0, np.int32)
        numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return (np.searchsorted(self.edges, numbers, side="right") + NUM_RESERVED_IDS).astype(np.int32)


def _merge_counts(counts: Mapping[str, pa.Table], owner: str) -> pa.Table:
    """Columns `value` (distinct), `count` over all fields and `rows` in the owner, most frequent first."""
    typed = [table for table in counts.values() if not pa.types.is_null(table.schema.field("value").type)]
    if not typed:
        return pa.table([pa.nulls(0), *[pa.array([], pa.int64())] * 2], ["value", "count", "rows"])
    stacked = []
    for field_name, table in counts.items():
        rows = table["count"] if field_name == owner else pa.array(np.zeros(len(table), np.int64))
        columns = [table["value"].cast(typed[0].schema.field("value").type), table["count"], rows]
        stacked.append(pa.table(columns, ["value", "count", "rows"]))
    merged = pa.concat_tables(stacked).group_by("value").aggregate([("count", "sum"), ("rows", "sum")])
    ordered = merged.sort_by([("count_sum", "descending"), ("value", "ascending")])
    return ordered.select(["value", "count_sum", "rows_sum"]).rename_columns(["value", "count", "rows"])


def _kept_first(merged: pa.Table, kept: pa.Array) -> pa.Table:
    """The kept values in their order, those that were not seen counting 0, and then all others."""
    merged = merged.set_column(0, "value", merged["value"].cast(kept.type))
    again = merged.take(pc.index_in(kept, value_set=merged["value"]))
    columns = [kept, *(pc.fill_null(again[name], 0) for name in ("count", "rows"))]
    is_new = pc.invert(pc.is_in(merged["value"], value_set=kept))
    return pa.concat_tables([pa.table(columns, merged.column_names), merged.filter(is_new)])


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
