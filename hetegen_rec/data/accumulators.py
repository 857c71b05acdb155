"""Counting the values of one field in bounded memory, mergeable across ranks.

Every accumulator gives the same result however the rows were split and in whatever order they came.
They travel between ranks of one job as pickles.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hetegen_rec.config.schema import Field
from hetegen_rec.data.columns import FieldValues, ValueType
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.hashing import UInt64Array, mix64, salt_of
from hetegen_rec.data.vocabulary import HashVocabulary, hash_values

MAX_DISTINCT = 50_000_000
"""Most distinct values of a `vocab` field; counting more exactly would not be bounded memory."""
MAX_CELLS = 65_536
"""Most cells of a numeric field's histogram."""
SKETCH_SIZE = 65_536
"""Hashes kept to estimate cardinalities: a standard error of 0.4 %, exact below that many."""

_PENDING_ROWS = 1 << 20
_NO_COUNTS = pa.table([pa.nulls(0), pa.array([], pa.int64())], ["value", "count"])
_SIGN = np.uint64(1 << 63)


class Counter(Protocol):
    """Counts of the values of a field."""

    def add(self, values: pa.Array) -> None:
        """Counts values: int64, float64 or large_string, without nulls."""
        ...

    def merge(self, other: "Counter") -> None:
        """Adds the counts of another counter of the same kind."""
        ...


class FieldAccumulator:
    """What is counted of one field: missing values, values by kind, and where their type was seen.

    Args:
        field: the field.
        owner: the field that owns its table.
        expected: the type that values must have, if they must not follow the first ones.
    """

    def __init__(self, field: Field, owner: Field, expected: ValueType = "none") -> None:
        self._field = field
        self._expected = expected
        self.num_values = 0
        self.num_missing = 0
        self.value_type: ValueType = "none"
        self.typed_in = ""
        self.counter = _counter(field, owner)

    def add(self, found: FieldValues, where: str) -> None:
        """Counts the values of some rows, of a type that was checked."""
        self._note_type(found.value_type, where)
        self.num_values += len(found.values)
        self.num_missing += int((found.lengths == 0).sum())
        if len(found.values):
            self.counter.add(found.values)

    def merge(self, other: "FieldAccumulator") -> None:
        """Adds another rank's counts; BadRowsError if it saw another type."""
        self.check_type(other.value_type, other.typed_in)
        self._note_type(other.value_type, other.typed_in)
        self.num_values += other.num_values
        self.num_missing += other.num_missing
        self.counter.merge(other.counter)

    def check_type(self, value_type: ValueType, where: str) -> None:
        """Raises BadRowsError if values of this type do not go with those before."""
        if value_type == "none":
            return
        if self._expected not in ("none", value_type):
            raise self._mixed(where, value_type, "most training rows are stored as", self._expected)
        if self.value_type not in ("none", value_type):
            raise self._mixed(where, value_type, f"{self.typed_in} holds", self.value_type)

    def _note_type(self, value_type: ValueType, where: str) -> None:
        if self.value_type == "none" != value_type:
            self.value_type, self.typed_in = value_type, where

    def _mixed(self, where: str, found: ValueType, others: str, expected: ValueType) -> BadRowsError:
        return BadRowsError(
            f"{where}: column {self._field.column!r} of field {self._field.name!r} holds {found} values, but "
            f"{others} {expected} values; write all shards with one type"
        )


def _counter(field: Field, owner: Field) -> Counter:
    if owner.vocabulary == "hash":
        return HashCounter(owner.name, owner.hash_size or 0)
    if owner.vocabulary == "buckets":
        return Histogram()
    return ValueCounter(field.name)


class ValueCounter:
    """Exact counts of distinct values, merged in Arrow whenever as much is pending as is merged."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._merged: pa.Table | None = None
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, values: pa.Array) -> None:
        """Counts values; DataError once there are more than MAX_DISTINCT different ones."""
        counted = pc.value_counts(values)
        self._append(pa.table([counted.field("values"), counted.field("counts")], ["value", "count"]))

    def merge(self, other: Counter) -> None:
        """Adds another counter's counts."""
        assert isinstance(other, ValueCounter)
        if len(other.table):
            self._append(other.table)

    @property
    def table(self) -> pa.Table:
        """Columns `value` (distinct) and `count` (int64), in no particular order."""
        self._compact()
        return self._merged if self._merged is not None else _NO_COUNTS

    def _append(self, counts: pa.Table) -> None:
        self._pending.append(counts)
        self._pending_rows += len(counts)
        if self._pending_rows > max(_PENDING_ROWS, len(self._merged or ())):
            self._compact()

    def _compact(self) -> None:
        if not self._pending:
            return
        parts = [*self._pending, *([] if self._merged is None else [self._merged])]
        grouped = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
        self._merged = grouped.rename_columns(["value", "count"])
        self._pending, self._pending_rows = [], 0
        if len(self._merged) > MAX_DISTINCT:
            raise DataError(
                f"field {self._name!r} has more than {MAX_DISTINCT:,} distinct values in the training rows, "
                "too many to count exactly; set `vocabulary: hash` with a `hash_size` for it"
            )


class HashCounter:
    """Counts per id of a `hash` table, and a sketch of the number of distinct values."""

    def __init__(self, table: str, hash_size: int) -> None:
        self._vocabulary = HashVocabulary(table, hash_size)
        self._salt = salt_of(f"{table} cardinality")
        self.counts = np.zeros(self._vocabulary.num_ids, np.int64)
        self.distinct = DistinctSketch()

    def add(self, values: pa.Array) -> None:
        """Counts values by id."""
        ids, counts = np.unique(self._vocabulary.lookup(values), return_counts=True)
        self.counts[ids] += counts
        self.distinct.add(hash_values(values, self._salt))

    def merge(self, other: Counter) -> None:
        """Adds another counter's counts."""
        assert isinstance(other, HashCounter)
        self.counts += other.counts
        self.distinct.add(other.distinct.hashes)


class Histogram:
    """Counts of numbers in at most MAX_CELLS cells: exact values while there are few, floats of
    fewer and fewer mantissa bits as there are more.

    A cell is an interval that starts at a float with the lowest bits of its order-preserving code cut
    off, so its width is relative to its magnitude, as in DDSketch (Masson, Rim and Lee, VLDB 2019).
    The number of bits cut is the smallest that fits all values seen, whatever their order, so
    histograms merge to exactly what one pass gives; and edges between cells have exact counts.
    """

    def __init__(self) -> None:
        self._cut_bits = 0
        self._codes = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)
        self.distinct = DistinctSketch()

    def add(self, values: pa.Array) -> None:
        """Counts numbers."""
        codes, counts = np.unique(_ordered_codes(values.to_numpy(zero_copy_only=False)), return_counts=True)
        self.distinct.add(mix64(codes, 0))
        self._add(codes, counts)

    def merge(self, other: Counter) -> None:
        """Adds another histogram's counts."""
        assert isinstance(other, Histogram)
        self._cut_bits = max(self._cut_bits, other._cut_bits)
        self.distinct.add(other.distinct.hashes)
        self._add(other._codes, other._counts)

    @property
    def starts(self) -> npt.NDArray[np.float64]:
        """The smallest number of each cell, ascending."""
        return _numbers_of(self._codes)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Numbers seen in each cell."""
        return self._counts

    def edges(self, num_buckets: int) -> npt.NDArray[np.float64]:
        """Inner edges of at most `num_buckets` buckets of about equal counts, ascending.

        With no more cells than buckets, every cell is a bucket of its own. A number is in the bucket
        whose index is the number of edges that are not above it.
        """
        if len(self._codes) <= num_buckets:
            return self.starts[1:]
        cumulative = np.cumsum(self._counts)
        targets = cumulative[-1] * np.arange(1, num_buckets) / num_buckets
        cells = np.unique(np.searchsorted(cumulative, targets, side="right"))
        inner: npt.NDArray[np.float64] = self.starts[cells[cells > 0]]
        return inner

    def _add(self, codes: UInt64Array, counts: npt.NDArray[np.int64]) -> None:
        codes, counts = np.concatenate([self._codes, codes]), np.concatenate([self._counts, counts])
        while True:
            cut = np.uint64(self._cut_bits)
            self._codes, cells = np.unique(codes >> cut << cut, return_inverse=True)
            if len(self._codes) <= MAX_CELLS:
                break
            self._cut_bits += 1
        self._counts = np.zeros(len(self._codes), np.int64)
        np.add.at(self._counts, cells, counts)


class DistinctSketch:
    """Estimates a number of distinct values from the k smallest hashes (Bar-Yossef et al., 2002)."""

    def __init__(self) -> None:
        self.hashes: UInt64Array = np.empty(0, np.uint64)

    def add(self, hashes: UInt64Array) -> None:
        """Takes in hashes of values, or those that another sketch holds."""
        if len(self.hashes) == SKETCH_SIZE:
            hashes = hashes[hashes < self.hashes[-1]]
        if len(hashes):
            self.hashes = np.union1d(self.hashes, hashes)[:SKETCH_SIZE]

    @property
    def estimate(self) -> int:
        """Distinct values: exact below SKETCH_SIZE."""
        if len(self.hashes) < SKETCH_SIZE:
            return len(self.hashes)
        return round((SKETCH_SIZE - 1) / ((int(self.hashes[-1]) + 1) / 2**64))


def _ordered_codes(numbers: npt.NDArray[np.float64]) -> UInt64Array:
    """Integers in the order of the numbers: the bits, negative numbers flipped below positive ones."""
    bits = numbers.view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _numbers_of(codes: UInt64Array) -> npt.NDArray[np.float64]:
    numbers: npt.NDArray[np.float64] = np.where(codes & _SIGN, codes ^ _SIGN, ~codes).view(np.float64)
    # Below the code of minus infinity, where cutting bits leads, are no numbers.
    return np.where(np.isnan(numbers), -np.inf, numbers)
