"""The small raw click log with times, in files of two column types, for tests of what follows time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from raw_log import FEATURES, config_for, rows

from hetegen_rec.config.loading import parse_config
from hetegen_rec.config.run import RunConfig

TIMED = FEATURES | {"timestamp": "at"}
SIZES = {"train": 160, "valid": 20, "test": 20}
NUM_ROWS = sum(SIZES.values())


def timed_rows(times: np.ndarray, seed: int = 0) -> pa.Table:
    return rows(len(times), seed).append_column("at", pa.array(times))


def write_log(root: Path, times: np.ndarray | None = None) -> pa.Table:
    """Writes splits in order of time; valid stores its prices in another type. Returns all rows."""
    times = np.arange(NUM_ROWS) * 10 + 1000 if times is None else times
    log, start = timed_rows(times), 0
    for split, size in SIZES.items():
        (root / split).mkdir(parents=True)
        part = log.slice(start, size)
        if split == "valid":
            place = part.column_names.index("price")
            part = part.set_column(place, "price", part["price"].cast(pa.float32()))
        pq.write_table(part, root / split / "part.parquet", row_group_size=16)
        start += size
    return log


def timed_config(root: Path, features: dict[str, Any] = TIMED, **incremental: Any) -> RunConfig:
    values = config_for(root, features).model_dump()
    return parse_config(values | {"incremental": incremental}, "test")
