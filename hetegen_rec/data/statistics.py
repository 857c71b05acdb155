"""What is known of the training rows: the one artifact behind encoding, the logQ correction, chance
levels, regularisation, slices and test-time confidence. Counted once, on training rows only.

The same data give the same statistics whatever the number of ranks, files and row groups.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, ReservedId, Schema
from hetegen_rec.data.accumulators import FieldAccumulator
from hetegen_rec.data.columns import ValueType, field_values, labels, timestamps
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.vocabulary import TableIdentity

STATISTICS_FILE = "statistics.json"
_ARRAYS_DIR = "arrays"
_UNSEEN_COUNT = 0.5  # what an id that was never seen counts for, to keep logarithms finite


@dataclass(frozen=True, eq=False)
class FieldStatistics:
    """The training values of one field."""

    name: str
    num_values: int
    """Values kept after lists were cut to length, missing ones excluded."""
    num_missing: int
    """Rows without a value."""
    num_out_of_vocabulary: int
    """Values without an id of their own."""
    cardinality: int
    """Distinct raw values; for `hash` and `buckets` an estimate (+-0.4 %) from 65,536 up."""
    num_ids: int
    """Rows of the field's table, the two reserved ones included."""
    entropy: float
    """Entropy of the ids, reserved ones excluded, in nats."""
    counts: npt.NDArray[np.int64]
    """[num_ids] training occurrences of each id in this field."""
    bucket_edges: npt.NDArray[np.float64] | None = None
    """`buckets`: inner edges, ascending."""
    table: str = ""
    """The field that owns the table; left out, the field itself."""
    value_type: ValueType = "none"
    """Type of the raw values of all fields on the table (see `columns`)."""
    vocabulary_checksum: str = ""
    """`vocab`: identifies the vocabulary of the table."""
    identity: TableIdentity | None = None
    """Which value each id of the table stands for; None if this was not made by `summarise_table`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", self.table or self.name)

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes the counts as an array under `directory`; returns the rest as plain values."""
        (directory / _ARRAYS_DIR).mkdir(parents=True, exist_ok=True)
        np.save(_counts_path(directory, self.name), self.counts)
        return self._plain()

    @classmethod
    def load(cls, directory: Path, plain: Mapping[str, Any]) -> "FieldStatistics":
        """The inverse of `save`; the counts stay on disk, memory-mapped."""
        edges, identity = plain["bucket_edges"], plain["identity"]
        return cls(
            **{
                **plain,
                "bucket_edges": None if edges is None else np.asarray(edges, np.float64),
                "identity": None if identity is None else TableIdentity.from_json(identity),
                "counts": np.load(_counts_path(directory, plain["name"]), mmap_mode="r"),
            }
        )

    def _plain(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key != "counts"}
        edges, identity = self.bucket_edges, self.identity
        return {
            **plain,
            "bucket_edges": None if edges is None else edges.tolist(),
            "identity": None if identity is None else identity.as_json(),
        }


@dataclass(frozen=True, eq=False)
class Statistics:
    """The training rows, field by field."""

    num_rows: int
    num_positives: int
    fields: dict[str, FieldStatistics]

    def table_rows(self, table: str) -> int:
        """Rows of an embedding table, by the field that owns it."""
        return self.fields[table].num_ids

    @property
    def table_identities(self) -> dict[str, TableIdentity]:
        """Which value each id stands for, by table."""
        owners = (field for field in self.fields.values() if field.name == field.table)
        return {field.name: field.identity for field in owners if field.identity is not None}

    def log_prior(self, field: str, oov_dropout: float = 0.0) -> npt.NDArray[np.float32]:
        """[num_ids] log share of each id among the field's in-vocabulary training values.

        Under dropout the values that keep their id count. Reserved and unseen ids get the log share
        of half an occurrence.
        """
        counts = self._kept(field, oov_dropout)
        total = max(counts.sum(), 1.0)
        shares: npt.NDArray[np.float64] = np.log(np.maximum(counts, _UNSEEN_COUNT) / total)
        return shares.astype(np.float32)

    def entropy(self, field: str, oov_dropout: float = 0.0) -> float:
        """Entropy in nats of the field's in-vocabulary training values; under dropout of those that keep
        their id.
        """
        return entropy_of(self._kept(field, oov_dropout)) if oov_dropout else self.fields[field].entropy

    def _kept(self, field: str, oov_dropout: float) -> npt.NDArray[np.float64]:
        """[num_ids] expected in-vocabulary training values of each id, dropped ones left out."""
        counts: npt.NDArray[np.float64] = self.fields[field].counts.astype(np.float64)
        counts[:NUM_RESERVED_IDS] = 0
        if oov_dropout:
            counts *= 1.0 - drop_probability(self.lookups(self.fields[field].table), oov_dropout)
        return counts

    def lookups(self, table: str) -> npt.NDArray[np.float64]:
        """[num_ids] lookups of each table row in all training rows, over all fields on the table.

        A missing value looks up row 0, an absent sequence position nothing.
        """
        on_table = [field.counts for field in self.fields.values() if field.table == table]
        counts: npt.NDArray[np.float64] = np.sum(on_table, axis=0, dtype=np.float64)
        return counts

    def log_rate(self, table: str, oov_dropout: float = 0.0) -> npt.NDArray[np.float32]:
        """[num_ids] log expected lookups of each table row by one training row.

        Under dropout an id gives `drop_probability` of its lookups to the out-of-vocabulary row.
        Never below half a lookup in all training rows.
        """
        counts = self.lookups(table)
        if oov_dropout:
            dropped = counts * drop_probability(counts, oov_dropout)
            counts -= dropped
            counts[ReservedId.OUT_OF_VOCABULARY] += dropped.sum()
        rates: npt.NDArray[np.float64] = np.log(np.maximum(counts, _UNSEEN_COUNT) / max(self.num_rows, 1))
        return rates.astype(np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies statistics and vocabularies: what was trained under one fits no other."""
        # The entropy sums up all counts; its last digits may depend on the machine.
        fields = [{**f._plain(), "entropy": round(f.entropy, 6)} for f in self.fields.values()]
        content = json.dumps([self.num_rows, self.num_positives, fields], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes `statistics.json` and one array of counts a field."""
        directory = Path(directory)
        write_statistics(
            directory,
            self.num_rows,
            self.num_positives,
            [field.save(directory) for field in self.fields.values()],
        )

    @classmethod
    def load(cls, directory: str | Path) -> "Statistics":
        """Reads what `save` wrote; counts stay on disk, memory-mapped.

        Raises:
            DataError: there are no statistics in the directory.
        """
        path = Path(directory) / STATISTICS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; run prepare first") from error
        fields = [FieldStatistics.load(Path(directory), plain) for plain in content["fields"]]
        return cls(content["num_rows"], content["num_positives"], {field.name: field for field in fields})


def drop_probability(lookups: npt.NDArray[np.float64], oov_dropout: float) -> npt.NDArray[np.float64]:
    """How likely each id is replaced by out-of-vocabulary: a / (a + n), and 0 for reserved ids.

    Args:
        lookups: [num_ids] n, as `Statistics.lookups` has it.
        oov_dropout: a > 0.
    """
    probability = oov_dropout / (oov_dropout + lookups)
    probability[:NUM_RESERVED_IDS] = 0.0
    return probability


def entropy_of(counts: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> float:
    """Entropy in nats of a distribution by its counts; 0 if there are none."""
    seen = counts[counts > 0]
    shares = seen / seen.sum()
    return float(max(-(shares * np.log(shares)).sum(), 0.0))


def write_statistics(
    directory: Path, num_rows: int, num_positives: int, fields: list[dict[str, Any]]
) -> None:
    """Writes `statistics.json` around fields whose counts are already saved."""
    content = {"num_rows": num_rows, "num_positives": num_positives, "fields": fields}
    text = json.dumps(content, indent=1)
    (directory / STATISTICS_FILE).write_text(text, encoding="utf-8")


class Accumulator:
    """Counts training rows: labels, and every field's values. Mergeable by table.

    Args:
        schema: the schema.
        expected_types: the types that the values on each table must have, by the field that owns it;
            without one, every value must be of the type of the first.
    """

    def __init__(self, schema: Schema, expected_types: Mapping[str, ValueType] | None = None) -> None:
        self._schema = schema
        self.num_rows = 0
        self.num_positives = 0
        expected = expected_types or {}
        self.fields = {
            field.name: FieldAccumulator(
                field, schema.field(field.table_name), expected.get(field.table_name, "none")
            )
            for field in schema.fields
        }

    def add(self, table: pa.Table, first_row: int, where: str) -> None:
        """Counts the rows of a raw table, all of them or none.

        Args:
            table: raw columns.
            first_row: index of its first row in the split, for errors.
            where: file and row group, for errors.

        Raises:
            BadRowsError: a column has the wrong type, or a value is wrong; nothing was counted.
            DataError: the values are too many to be counted.
        """
        clicks = labels(table, self._schema, first_row, where)
        if self._schema.timestamp:
            timestamps(table, self._schema, where)
        found = {field.name: field_values(table, field, first_row, where) for field in self._schema.fields}
        for name, values in found.items():
            self.fields[name].check_type(values.value_type, where)
        self.num_rows += len(table)
        self.num_positives += int(clicks.sum())
        for name, values in found.items():
            self.fields[name].add(values, where)

    def of_table(self, table: str) -> dict[str, FieldAccumulator]:
        """The accumulators of the fields on one table."""
        return {f.name: self.fields[f.name] for f in fields_on(self._schema, table)}


def fields_on(schema: Schema, table: str) -> list[Field]:
    """The fields whose ids index a table: its owner and the sequences that share it."""
    return [field for field in schema.fields if field.table_name == table]


def _counts_path(directory: Path, field: str) -> Path:
    return directory / _ARRAYS_DIR / f"{field}.counts.npy"
