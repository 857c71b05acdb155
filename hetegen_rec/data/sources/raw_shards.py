"""How a built-in data set lies on disk: splits by time, splits in shards, shards in row groups."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TRAIN_SHARDS = 4
"""Fewest shards of a training split: more than one, so that every path of a real log is walked."""


def split_rows(num_rows: int) -> dict[str, range]:
    """The rows of each split, 80/10/10, where rows are numbered in order of time."""
    train_end, valid_end = num_rows * 8 // 10, num_rows * 9 // 10
    return {
        "train": range(train_end),
        "valid": range(train_end, valid_end),
        "test": range(valid_end, num_rows),
    }


def shard_rows(rows: range, num_shards: int) -> list[range]:
    """Cuts rows into at most `num_shards` consecutive intervals, all but the last of equal length."""
    length = max(1, -(-len(rows) // num_shards))
    return [rows[start : start + length] for start in range(0, len(rows), length)]


def open_shard(directory: Path, split: str, index: int, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of the shard `{split}/part-{index}.parquet` under `directory`."""
    path = directory / split / f"part-{index:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(path, schema, compression="zstd")
