"""Small encoded shards whose rows tell which rows they are, and readers of them."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.encoded_rows import encoded_schema, open_encoded_file
from hetegen_rec.data.raw import list_row_groups
from hetegen_rec.data.reader import Reader

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "fields": [
            {"name": "item", "kind": "id"},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
            {"name": "tags", "kind": "multi_valued", "max_length": 2},
        ],
    }
)
NUM_IDS = 50


class FlatStatistics:
    """Every id is as frequent as any other."""

    def table_rows(self, table):
        return NUM_IDS

    def log_prior(self, field, oov_dropout=0.0):
        return np.zeros(NUM_IDS, dtype=np.float32)

    def lookups(self, table):
        return np.full(NUM_IDS, 2.0)

    def log_rate(self, table, oov_dropout=0.0):
        return np.full(NUM_IDS, -4.0, dtype=np.float32)


def encoded_rows(start, stop):
    """Rows whose content tells which row it is."""
    rows = range(start, stop)
    return pa.table(
        {
            "item": [row % NUM_IDS for row in rows],
            "history": [[(row + i) % NUM_IDS for i in range(row % 4)] for row in rows],
            "tags": [[row % 7] for row in rows],
            "__label": [float(row % 2) for row in rows],
            "__row_id": list(rows),
        },
        schema=encoded_schema(SCHEMA),
    )


@dataclass
class Shards:
    """Parquet files on disk."""

    directory: str

    @property
    def row_groups(self):
        return list_row_groups([f"{self.directory}/*.parquet"])


def write_shards(directory, sizes):
    """One file for every two row groups of these sizes."""
    first = 0
    for start in range(0, len(sizes), 2):
        with open_encoded_file(directory / f"part-{start:03d}.parquet", encoded_schema(SCHEMA)) as writer:
            for size in sizes[start : start + 2]:
                writer.write_table(encoded_rows(first, first + size))
                first += size
    return Shards(str(directory))


def open_shards(shards, oov_dropout=0.0, **changes):
    arguments = {
        "rank": 0,
        "world_size": 1,
        "batch_size": 8,
        "num_lanes": 1,
        "seed": 3,
        "shuffle": True,
        "shuffle_rows": 10,
        "prefetch_batches": 2,
        "columns": encoded_schema(SCHEMA).names,
    }
    batcher = Batcher(SCHEMA, FlatStatistics(), oov_dropout)
    return Reader(shards.row_groups, batcher, **{**arguments, **changes})
