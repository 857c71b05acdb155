"""Small raw files, and ways to damage one or to make it odd, for tests of what reading makes of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hetegen_rec.config.loading import parse_config
from hetegen_rec.config.run import RunConfig

FILES = ("train/a", "train/b", "train/c", "valid/a", "valid/b", "test/a", "test/b")
ROWS_PER_GROUP = 10
GROUPS_PER_FILE = 2
ROWS_PER_FILE = ROWS_PER_GROUP * GROUPS_PER_FILE
SPLITS = ("train", "valid", "test")


def log(num_rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 5, num_rows)]
    return pa.table(
        {
            "click": rng.integers(0, 2, num_rows),
            "time": rng.integers(0, 10**9, num_rows),
            "user": [f"user {i}" for i in rng.integers(0, 9, num_rows)],
            "item": rng.integers(0, 9, num_rows),
            "price": rng.normal(size=num_rows),
            "tags": pa.array([[f"tag {i}" for i in values] for values in lists], pa.list_(pa.string())),
            "history": pa.array(lists, pa.list_(pa.int64())),
        }
    )


def values_of(root: Path, **data: Any) -> dict[str, Any]:
    paths = {split: f"{root}/{split}/*.parquet" for split in SPLITS}
    return {
        "name": "hostile",
        "run_dir": str(root / "run"),
        "data": {**paths, "prepared_dir": str(root / "prepared"), **data},
        "features": {
            "label": "click",
            "timestamp": "time",
            "user": "user",
            "item": "item",
            "fields": [
                {"name": "user", "kind": "id"},
                {"name": "item", "kind": "id"},
                {"name": "price", "kind": "numeric", "num_buckets": 4},
                {"name": "tags", "kind": "multi_valued", "max_length": 3},
                {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
            ],
        },
    }


def config_of(root: Path, **data: Any) -> RunConfig:
    return parse_config(values_of(root, **data), "test")


def path_of(root: Path, name: str) -> Path:
    return root / f"{name}.parquet"


def write(path: Path, table: pa.Table, row_group_size: int = ROWS_PER_GROUP) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)


def write_raw(root: Path) -> None:
    for seed, name in enumerate(FILES):
        write(path_of(root, name), log(ROWS_PER_FILE, seed))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


Damage = Callable[[Path], None]
"""Does something to one raw file."""


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda path: write(path, change(pq.read_table(path)))


def with_value(column: str, value: Any) -> Damage:
    """The value stands in row 13, that is in the second row group."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[13] = value
        return with_column(table, column, pa.array(values))

    return rewritten(change)


def stored_as(column: str, kind: pa.DataType) -> Damage:
    return rewritten(lambda table: with_column(table, column, table[column].combine_chunks().cast(kind)))


def not_utf8(table: pa.Table) -> pa.Table:
    values = table["user"].cast(pa.binary()).to_pylist()
    values[13] = b"caf\xe9"
    array = pa.array(values, pa.binary())
    return with_column(table, "user", pa.Array.from_buffers(pa.string(), len(array), array.buffers()))


def flip_a_bit(path: Path) -> None:
    """In the last value of a column of the second row group."""
    chunk = pq.read_metadata(path).row_group(1).column(3)
    content = bytearray(path.read_bytes())
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def with_item_twice(table: pa.Table) -> pa.Table:
    return table.append_column("item", table["price"])


def huge_times(table: pa.Table) -> pa.Table:
    return with_column(table, "time", pa.array([2**64 - 1] * len(table), pa.uint64()))


def encoded(prepared: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((prepared / split).glob("*.parquet")))


def named(cases: Any) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
