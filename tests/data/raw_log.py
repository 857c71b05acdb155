"""A small raw click log of every kind of field, its configuration, and workers that prepare it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config import RunConfig
from hetegen_rec.config.loading import parse_config

FEATURES: dict[str, Any] = {
    "label": "y",
    "user": "user",
    "item": "item",
    "fields": [
        {"name": "item", "kind": "id", "min_count": 2},
        {"name": "user", "kind": "id"},
        {"name": "place", "kind": "id", "vocabulary": "hash", "hash_size": 20},
        {"name": "price", "kind": "numeric", "num_buckets": 4},
        {"name": "tags", "kind": "multi_valued"},
        {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
    ],
}


class Threads:
    """Workers that are threads of this process; written like a process group would behave."""

    def __init__(self, rank: int, world: "World") -> None:
        self.rank, self.world_size, self._world = rank, world.size, world

    def gather(self, value: Any) -> list[Any]:
        self._world.slots[self.rank] = value
        self._world.barrier.wait()
        values = list(self._world.slots)
        self._world.barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(failure)
        if failure is not None:
            raise failure
        if any(failures):
            raise RuntimeError(f"{what} failed on another rank")


class World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, work: Callable[[Threads], Any]) -> list[Any]:
        """What each rank returned or raised."""
        results: list[Any] = [None] * self.size

        def main(rank: int) -> None:
            try:
                results[rank] = work(Threads(rank, self))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


def rows(num_rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    items = random.zipf(1.5, num_rows) % 50
    lists = [random.integers(0, 50, n).tolist() for n in random.integers(0, 6, num_rows)]
    return pa.table(
        {
            "y": random.integers(0, 2, num_rows),
            "item": pa.array(items, mask=random.random(num_rows) < 0.1),
            "user": [f"user {i}" for i in random.integers(0, 30, num_rows)],
            "place": random.integers(0, 1000, num_rows),
            "price": random.lognormal(size=num_rows),
            "tags": [[f"t{i}" for i in values] for values in lists],
            "history": pa.array(lists, pa.list_(pa.int64())),
        }
    )


def config_for(root: Path, features: dict = FEATURES, **data: Any) -> RunConfig:
    paths = {split: f"{root}/{split}/*.parquet" for split in ("train", "valid", "test")}
    values = {**paths, "prepared_dir": f"{root}/prepared", "rows_per_group": 20, **data}
    run = {"name": "t", "run_dir": f"{root}/run", "features": features, "data": values}
    return parse_config(run, "test")


def encoded(root: Path, split: str, prepared: str = "prepared") -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((root / prepared / split).glob("*.parquet")))


def raw_table(root: Path, split: str) -> pa.Table:
    files = [pq.ParquetFile(path) for path in sorted((root / split).glob("*.parquet"))]
    return pa.concat_tables(file.read() for file in files if file.metadata.num_rows)
