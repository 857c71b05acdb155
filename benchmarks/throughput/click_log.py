"""Encoded rows for benchmarks: id fields drawn by Zipf's law, made from a seed, with their statistics.

Nothing can be learnt from them. What a step costs depends on how many rows there are, how wide they are and
how often each id comes, and that is as in a click log.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt, model_validator

from hetegen_rec.config.errors import Section
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batching import LABEL, ROW_ID, encoded_schema
from hetegen_rec.data.statistics import FieldStatistics, Statistics

HISTORY = "history"
CLICK_RATE = 0.25
_SCATTER = 2_654_435_761  # a prime: k -> k * _SCATTER mod n is one to one for smaller n


class LogConfig(Section):
    """What is generated."""

    fields: PositiveInt = 26
    """Id fields, each with a table of its own."""
    table_rows: PositiveInt = 1_000_000
    """Rows of all tables together, besides the reserved ones; each field has an equal share."""
    sequence_length: NonNegativeInt = 0
    """Items of a full behaviour sequence on the first field's table; 0 for no such field."""
    rows: PositiveInt = 131_072
    """Rows of the log."""
    rows_per_group: PositiveInt = 65_536
    """Rows of a Parquet row group."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> "LogConfig":
        if self.values_per_field < 2:
            raise ValueError(
                f"`table_rows: {self.table_rows}` leaves a field of {self.fields} without values"
            )
        return self

    @property
    def values_per_field(self) -> int:
        """Distinct values that a field may take."""
        return self.table_rows // self.fields

    @property
    def names(self) -> list[str]:
        """Of the id fields."""
        return [f"id_{number:02d}" for number in range(self.fields)]

    def features(self) -> dict[str, Any]:
        """The section `features` of a run configuration."""
        hashed = {"kind": "id", "vocabulary": "hash", "hash_size": self.values_per_field}
        fields: list[dict[str, Any]] = [{"name": name, **hashed} for name in self.names]
        if self.sequence_length:
            sequence = {"kind": "sequence", "table": self.names[0], "max_length": self.sequence_length}
            fields.append({"name": HISTORY, **sequence})
        return {"label": "label", "fields": fields}


@dataclass(frozen=True)
class ClickLog:
    """Rows on disk, and what is known of them."""

    config: LogConfig
    path: Path
    schema: Schema
    statistics: Statistics

    @property
    def encoded_columns(self) -> list[str]:
        """What a reader reads."""
        names: list[str] = encoded_schema(self.schema).names
        return names


def write_click_log(config: LogConfig, path: Path) -> ClickLog:
    """Makes the rows, and writes them as one Parquet file of encoded rows."""
    schema = Schema.model_validate(config.features())
    rng = np.random.default_rng(config.seed)
    num_values = config.values_per_field
    ids = {name: _zipf(rng, num_values, config.rows) for name in config.names}
    columns: dict[str, Any] = {name: pa.array(values, pa.int32()) for name, values in ids.items()}
    if config.sequence_length:
        ids[HISTORY] = _zipf(rng, num_values, config.rows * config.sequence_length)
        offsets = np.arange(config.rows + 1) * config.sequence_length
        items = pa.array(ids[HISTORY], pa.int32())
        columns[HISTORY] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
    labels = (rng.random(config.rows) < CLICK_RATE).astype(np.float32)
    columns |= {LABEL: pa.array(labels), ROW_ID: pa.array(np.arange(config.rows))}
    table = pa.table(columns).select(encoded_schema(schema).names).cast(encoded_schema(schema))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=config.rows_per_group, compression="zstd")
    fields = {
        field.name: _count(field.name, field.table_name, ids[field.name], num_values)
        for field in schema.fields
    }
    return ClickLog(config, path, schema, Statistics(config.rows, int(labels.sum()), fields))


def _zipf(rng: np.random.Generator, num_values: int, count: int) -> NDArray[np.int64]:
    """[count] ids with P(rank k) ~ 1/k, frequent ones scattered over the table as hashing does."""
    rank = np.exp(rng.random(count) * np.log(num_values + 1)).astype(np.int64) - 1
    return NUM_RESERVED_IDS + np.minimum(rank, num_values - 1) * _SCATTER % num_values


def _count(name: str, table: str, ids: NDArray[np.int64], num_values: int) -> FieldStatistics:
    counts = np.bincount(ids, minlength=NUM_RESERVED_IDS + num_values)
    shares = counts[counts > 0] / len(ids)
    return FieldStatistics(
        name=name,
        num_values=len(ids),
        num_missing=0,
        num_out_of_vocabulary=0,
        cardinality=len(shares),
        num_ids=len(counts),
        entropy=float(-(shares * np.log(shares)).sum()),
        counts=counts,
        table=table,
    )
