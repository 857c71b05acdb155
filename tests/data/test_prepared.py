"""What readers learn of a prepared directory: the row groups of its usable rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone

from hetegen_rec.config import RunConfig
from hetegen_rec.config.data import Split
from hetegen_rec.config.loading import parse_config
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.prepare import prepare, read_statistics
from hetegen_rec.data.prepared import prepared_row_groups
from hetegen_rec.data.raw import RowGroup, read_shape


def prepared(root: Path, **data: Any) -> RunConfig:
    """Training rows in three files of two row groups, the one in the middle with a bad label."""
    for split, labels in {"train": ([0, 1, 1, 0], [1, 1, 0, 7], [0, 0, 1]), "valid": ([0, 1],)}.items():
        (root / split).mkdir()
        for part, values in enumerate(labels):
            table = pa.table({"click": values, "user": values})
            pq.write_table(table, root / split / f"{part}.parquet", row_group_size=2)
    paths = {split: f"{root}/{split}/*.parquet" for split in ("train", "valid")}
    data = {**paths, "prepared_dir": f"{root}/prepared", "on_bad_shard": "skip", **data}
    features = {"label": "click", "fields": [{"name": "user", "kind": "id"}]}
    config = parse_config({"name": "t", "run_dir": f"{root}/run", "features": features, "data": data}, "test")
    prepare(config, Alone())
    return config


def groups_of(config: RunConfig, split: Split) -> list[RowGroup]:
    return prepared_row_groups(config, split, read_statistics(config))


def test_on_the_fly_they_are_the_usable_ones_of_the_raw_files(tmp_path) -> None:
    config = prepared(tmp_path, encode="on_the_fly")
    paths = [f"{tmp_path}/train/{part}.parquet" for part in range(3)]
    stamps = [read_shape(path).stamp for path in paths]
    assert groups_of(config, "train") == [
        RowGroup(paths[0], 0, 2, 0, stamps[0]),
        RowGroup(paths[0], 1, 2, 2, stamps[0]),
        RowGroup(paths[1], 0, 2, 4, stamps[1]),
        RowGroup(paths[2], 0, 2, 8, stamps[2]),
        RowGroup(paths[2], 1, 1, 10, stamps[2]),
    ]
    path = f"{tmp_path}/valid/0.parquet"
    assert groups_of(config, "valid") == [RowGroup(path, 0, 2, 0, read_shape(path).stamp)]


def test_on_the_fly_no_raw_file_is_opened(tmp_path) -> None:
    config = prepared(tmp_path, encode="on_the_fly")
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    assert sum(group.num_rows for group in groups_of(config, "train")) == 9


def test_else_they_are_those_of_the_encoded_shards(tmp_path) -> None:
    config = prepared(tmp_path, rows_per_group=5)
    (first, second) = groups_of(config, "train")
    assert (first.num_rows, second.num_rows) == (5, 4)
    assert Path(first.path).parent == tmp_path / "prepared" / "train"


def test_a_directory_may_be_called_what_a_glob_is(tmp_path) -> None:
    config = prepared(tmp_path, prepared_dir=f"{tmp_path}/sweep[1]*")
    assert sum(group.num_rows for group in groups_of(config, "train")) == 9


def test_a_lost_shard_is_noticed(tmp_path) -> None:
    config = prepared(tmp_path, rows_per_group=5)
    shard = tmp_path / "prepared" / "train" / "part-00000-00000.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 8), shard)
    with pytest.raises(DataError, match=r"prepared: holds 8 rows of `train`, but 9 were prepared; delete"):
        groups_of(config, "train")
    (tmp_path / "prepared" / "row_groups.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"row_groups\.parquet: cannot be read; run prepare again"):
        groups_of(
            config.model_copy(update={"data": config.data.model_copy(update={"encode": "on_the_fly"})}),
            "train",
        )
