"""The row groups of a prepared run's splits, for readers: of its encoded shards, or of the raw files."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.errors import DataError, PreparedAnewError
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.raw import RowGroup, list_row_groups
from hetegen_rec.data.row_pass import num_rows_of
from hetegen_rec.data.statistics import Statistics

ROW_GROUPS_FILE = "row_groups.parquet"

_COLUMNS = pa.schema(
    {
        "split": pa.string(),
        "path": pa.string(),
        "index": pa.int64(),
        "num_rows": pa.int64(),
        "first_row": pa.int64(),
        "stamp": pa.string(),
    }
)


def write_row_groups(directory: Path, groups: Mapping[Split, Sequence[RowGroup]]) -> None:
    """Writes the usable row groups of the raw files, so that no reader needs their footers again."""
    rows = [{"split": split, **vars(group)} for split, of_split in groups.items() for group in of_split]
    table = pa.Table.from_pylist(rows, _COLUMNS)
    pq.write_table(table, directory / ROW_GROUPS_FILE, compression="zstd")


def prepared_row_groups(config: RunConfig, split: Split, statistics: Statistics) -> list[RowGroup]:
    """The row groups that hold a split's usable rows, whatever `data.encode` says.

    On the fly they are those of the raw files, as `prepare` found them; no raw file is opened. When they are
    read, other rows in their place are noticed.

    Args:
        config: the run.
        split: which rows.
        statistics: of the training rows, as the run took them from `data.prepared_dir`.

    Raises:
        DataError: the run is not prepared, or not all of what was prepared is there.
        PreparedAnewError: the directory holds another preparation than that of the statistics.
    """
    directory = Path(config.data.prepared_dir)
    # First the manifest: files that are put there later are not of its preparation.
    manifest = read_manifest(directory)
    if manifest.statistics_fingerprint != statistics.fingerprint:
        raise PreparedAnewError(str(directory))
    if config.data.encode == "on_the_fly":
        groups = _read_row_groups(directory / ROW_GROUPS_FILE, split)
    else:
        found = list_row_groups([f"{glob.escape(str(directory))}/{split}/*.parquet"])
        groups = [replace(group, preparation=manifest.preparation) for group in found]
    expected = manifest.num_rows[split]
    if num_rows_of(groups) != expected:
        raise DataError(
            f"{directory}: holds {num_rows_of(groups)} rows of `{split}`, but {expected} were prepared; "
            "delete the directory and run prepare again"
        )
    return groups


def _read_row_groups(path: Path, split: Split) -> list[RowGroup]:
    try:
        table = pq.read_table(path, filters=pc.field("split") == split)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read; run prepare again: {error}") from error
    return [RowGroup(**row) for row in table.drop_columns("split").to_pylist()]
