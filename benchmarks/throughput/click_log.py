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
from hetegen_rec.data.encoded_rows import LABEL, ROW_ID, encoded_schema, open_encoded_file
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
    rows_per_file: PositiveInt = 10_000_000
    """Rows of a Parquet file."""
    ordinary_parquet: bool = False
    """Whether to write as most Parquet is written, with dictionaries, Zstandard and nullable columns, in the
    place of the form of encoded rows."""
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
    paths: list[Path]
    """Of its files, in order."""
    schema: Schema
    statistics: Statistics

    @property
    def encoded_columns(self) -> list[str]:
        """What a reader reads."""
        names: list[str] = encoded_schema(self.schema).names
        return names


def write_click_log(config: LogConfig, path: Path) -> ClickLog:
    """Makes the rows, and writes them as Parquet files of encoded rows, holding one row group at a time.

    Args:
        config: what to make.
        path: of the file; where the rows are cut into several, their numbers stand before its suffix.
    """
    schema = Schema.model_validate(config.features())
    wanted = encoded_schema(schema)
    num_values = config.values_per_field
    counts = {field.name: np.zeros(NUM_RESERVED_IDS + num_values, np.int64) for field in schema.fields}
    num_clicks = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = _paths(config, path)
    for number, file in enumerate(paths):
        first, last = number * config.rows_per_file, min((number + 1) * config.rows_per_file, config.rows)
        with _open_file(config, file, wanted) as writer:
            for start in range(first, last, config.rows_per_group):
                rows = _Rows(config, range(start, min(start + config.rows_per_group, last)))
                writer.write_table(pa.table(rows.columns).select(wanted.names).cast(writer.schema))
                num_clicks += rows.num_clicks
                for name, ids in rows.ids.items():
                    counts[name] += np.bincount(ids, minlength=len(counts[name]))
    fields = {
        field.name: _statistics(field.name, field.table_name, counts[field.name]) for field in schema.fields
    }
    return ClickLog(config, paths, schema, Statistics(config.rows, num_clicks, fields))


def _paths(config: LogConfig, path: Path) -> list[Path]:
    num_files = -(-config.rows // config.rows_per_file)
    if num_files == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05d}{path.suffix}") for number in range(num_files)]


def _open_file(config: LogConfig, path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    if not config.ordinary_parquet:
        return open_encoded_file(path, schema)
    nullable = pa.schema([column.with_nullable(True) for column in schema])
    return pq.ParquetWriter(path, nullable, compression="zstd")


class _Rows:
    """Some rows of a log: the same ones, whatever they are made together with.

    One stream of random numbers holds the column of each field, one behind the other, and then the labels.
    """

    def __init__(self, config: LogConfig, rows: range) -> None:
        num_values = config.values_per_field
        self.ids: dict[str, NDArray[np.int64]] = {}
        """By field."""
        for number, name in enumerate(config.names):
            random = _uniform(config.seed, number * config.rows + rows.start, len(rows))
            self.ids[name] = _zipf(random, num_values)
        self.columns: dict[str, Any] = {
            name: pa.array(values, pa.int32()) for name, values in self.ids.items()
        }
        behind = config.fields * config.rows
        if length := config.sequence_length:
            random = _uniform(config.seed, behind + rows.start * length, len(rows) * length)
            self.ids[HISTORY] = _zipf(random, num_values)
            offsets = pa.array(np.arange(len(rows) + 1) * length, pa.int32())
            self.columns[HISTORY] = pa.ListArray.from_arrays(offsets, pa.array(self.ids[HISTORY], pa.int32()))
        behind += config.sequence_length * config.rows
        labels = (_uniform(config.seed, behind + rows.start, len(rows)) < CLICK_RATE).astype(np.float32)
        self.num_clicks = int(labels.sum())
        self.columns |= {LABEL: pa.array(labels), ROW_ID: pa.array(np.arange(rows.start, rows.stop))}


def _uniform(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """[count] numbers of the seed's stream of random ones, from `start` on."""
    return np.random.Generator(np.random.PCG64(seed).advance(start)).random(count)


def _zipf(random: NDArray[np.float64], num_values: int) -> NDArray[np.int64]:
    """Ids with P(rank k) ~ 1/k, frequent ones scattered over the table as hashing does.

    Args:
        random: equally likely numbers from 0 to 1.
        num_values: distinct ids.
    """
    rank = np.exp(random * np.log(num_values + 1)).astype(np.int64) - 1
    return NUM_RESERVED_IDS + np.minimum(rank, num_values - 1) * _SCATTER % num_values


def _statistics(name: str, table: str, counts: NDArray[np.int64]) -> FieldStatistics:
    num_values = int(counts.sum())
    shares = counts[counts > 0] / num_values
    return FieldStatistics(
        name=name,
        num_values=num_values,
        num_missing=0,
        num_out_of_vocabulary=0,
        cardinality=len(shares),
        num_ids=len(counts),
        entropy=float(-(shares * np.log(shares)).sum()),
        counts=counts,
        table=table,
    )
