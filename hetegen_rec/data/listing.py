"""The row groups of a run's raw files, from one look at each file that the ranks share out."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import pyarrow as pa

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import RunConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.bad_shards import BadShard
from hetegen_rec.data.columns import ValueType, time_unit, type_in
from hetegen_rec.data.delimited import is_csv
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.opening import check_columns
from hetegen_rec.data.raw import RowGroup, by_real_path, column_keys, expand_paths, read_shape, row_groups
from hetegen_rec.data.workers import Workers

Files: TypeAlias = dict[Split, list[str]]
Groups: TypeAlias = dict[Split, list[RowGroup]]

_THREADS = 16
"""Files looked at side by side: on a shared file system most of the time is spent waiting for it."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """What one look at a file tells."""

    group_rows: tuple[int, ...] | None
    """Rows of each row group; None where the file cannot be read."""
    value_types: tuple[ValueType, ...] = ()
    """Types of the schema's fields, as its columns are stored."""
    time_unit: str | None = None
    """Unit of the times (see `columns.time_unit`); None where they are not read, or there are none."""
    stamp: str | None = None
    """See `RowGroup`."""
    problem: str | None = None
    """Why the file cannot be used."""

    @property
    def num_rows(self) -> int | None:
        """Rows of the file, as far as is known."""
        return None if self.group_rows is None else sum(self.group_rows)


@dataclass(frozen=True)
class Listing:
    """The raw rows of a run."""

    groups: Groups
    """Row groups with rows, of every split."""
    bad: list[BadShard]
    """Files that cannot be used, where they are skipped."""
    stored_types: dict[str, ValueType]
    """The type that most training rows have on disk for the values on each table, by its owner."""


def find_files(config: RunConfig) -> Files:
    """The raw files of every split.

    Raises:
        DataError: a path of `data` stands for no file, or rows to measure on are trained on too.
    """
    files: Files = {split: expand_paths(config.data.raw_paths(split)) for split in config.splits()}
    trained = by_real_path(files["train"])
    for split in (name for name in files if name != "train"):
        for real, path in by_real_path(files[split]).items():
            if real in trained:
                raise DataError(f"{path} stands in `data.train` and in `data.{split}`; take it off one")
    return files


def list_groups(config: RunConfig, files: Files, workers: Workers) -> Listing:
    """Looks at every file of a run once. A collective.

    Raises:
        DataError: a file cannot be used and bad ones are not skipped, a split has no rows, or files store
            times in different units.
    """
    paths = list(dict.fromkeys(path for split in files.values() for path in split))
    with workers.together("checking the raw files"):
        for path in paths:
            _check_mode(path, config)
    found = look_at(paths, config.features, workers, skip=config.data.on_bad_shard == "skip")
    _require_one_time_unit(config.features, [(path, found[path].time_unit) for path in paths])
    groups: Groups = {}
    bad: list[BadShard] = []
    for split, names in files.items():
        of_split = _bad_files(split, names, found)
        left_out = {shard.where for shard in of_split}
        stamps = {path: found[path].stamp for path in names}
        all_groups = row_groups([(path, found[path].group_rows or ()) for path in names], stamps)
        groups[split] = [group for group in all_groups if group.path not in left_out]
        require_rows(config, split, groups[split], of_split)
        bad += of_split
    stored_types = _most_stored(config.features, [found[path] for path in files["train"]])
    return Listing(groups, bad, stored_types)


def look_at(
    paths: Sequence[str], schema: Schema, workers: Workers, *, labelled: bool = True, skip: bool = False
) -> dict[str, RawFile]:
    """What there is to know of files without reading rows: each rank looks at a share. A collective.

    Args:
        paths: the files.
        schema: whose columns they must have, if they have rows.
        workers: all must call.
        labelled: whether they need label and timestamp too.
        skip: whether to return what is wrong with a file, not to raise it.

    Raises:
        BadRowsError: a file cannot be read or lacks a column.
    """
    share = paths[workers.rank :: workers.world_size]
    look = partial(_look, schema=schema, labelled=labelled, skip=skip)
    with (
        workers.together("reading the raw files' footers"),
        ThreadPoolExecutor(_THREADS, thread_name_prefix="footers") as threads,
    ):
        found = dict(zip(share, threads.map(look, share), strict=True))
    return {path: file for part in workers.gather(found) for path, file in part.items()}


def require_rows(
    config: RunConfig, split: Split, groups: Collection[RowGroup], bad: Sequence[BadShard]
) -> None:
    """Raises DataError if no row of a split is left."""
    if groups:
        return
    if bad:
        raise DataError(
            f"split `{split}` is empty: all its rows are in {len(bad)} bad shard(s), the first being: "
            f"{bad[0].reason}"
        )
    raise DataError(
        f"split `{split}` is empty: no rows in {', '.join(config.data.raw_paths(split))}; "
        f"name files that hold rows under `data.{split}`"
    )


def _check_mode(path: str, config: RunConfig) -> None:
    if config.data.encode == "on_the_fly" and is_csv(path):
        raise DataError(
            f"{path}: `data.encode: on_the_fly` needs Parquet, CSV cannot be read by row group; "
            "use `prepared`"
        )


def _look(path: str, schema: Schema, *, labelled: bool, skip: bool) -> RawFile:
    group_rows = None
    try:
        shape = read_shape(path)
        group_rows = shape.group_rows
        if not any(group_rows):
            return RawFile(group_rows)
        check_columns(path, column_keys(schema, labelled=labelled), shape.schema.names)
    except BadRowsError as error:
        if not skip:
            raise
        return RawFile(group_rows, problem=str(error))
    stored = shape.schema.remove_metadata()
    unit = _time_unit(path, schema, stored) if labelled else None
    return RawFile(group_rows, _value_types(schema, stored), unit, shape.stamp)


def _time_unit(path: str, schema: Schema, stored: pa.Schema) -> str | None:
    if schema.timestamp is None:
        return None
    return "integer" if is_csv(path) else time_unit(stored.field(schema.timestamp).type)


def _require_one_time_unit(schema: Schema, units: Iterable[tuple[str, str | None]]) -> None:
    """Times are read as numbers in their column's unit: those of two units have no order."""
    first_of_unit: dict[str, str] = {}
    for path, unit in units:
        if unit is not None:
            first_of_unit.setdefault(unit, path)
    if len(first_of_unit) > 1:
        (unit, path), (other_unit, other), *_ = first_of_unit.items()
        raise DataError(
            f"timestamp column {schema.timestamp!r}: {path} stores {unit}, {other} stores {other_unit}; "
            "write all files of a run in one unit"
        )


def _bad_files(split: Split, paths: Sequence[str], found: dict[str, RawFile]) -> list[BadShard]:
    return [
        BadShard(split, path, found[path].num_rows, problem)
        for path in paths
        if (problem := found[path].problem) is not None
    ]


@lru_cache
def _value_types(schema: Schema, stored: pa.Schema) -> tuple[ValueType, ...]:
    """Cached, because thousands of files are stored alike."""
    return tuple(type_in(field, stored.field(field.column).type) for field in schema.fields)


def _most_stored(schema: Schema, files: Sequence[RawFile]) -> dict[str, ValueType]:
    """By rows, so that it does not depend on the ranks; between equally many, by name."""
    num_rows: Counter[tuple[str, ValueType]] = Counter()
    for file in files:
        if file.problem is not None or not file.num_rows:
            continue
        for field, value_type in zip(schema.fields, file.value_types, strict=True):
            if value_type != "none":
                num_rows[field.table_name, value_type] += file.num_rows
    ranked = sorted(num_rows, key=lambda key: (num_rows[key], key))
    return dict(ranked)
