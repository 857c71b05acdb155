"""Raw files to statistics, vocabularies and encoded shards, on any number of ranks.

Two passes over row groups, each rank reading its own contiguous share in bounded memory: one counts
the training rows, one encodes every split. In between, the counts of each table are merged by one
rank. The output appears at `data.prepared_dir` at the end, whole, or not at all:

    manifest.json                         what this was made from
    statistics.json, arrays/              `Statistics`
    vocabulary/<table>.parquet            exact vocabularies
    {train,valid,test}/part-RRRRR-NNNNN.parquet   encoded rows in raw order (rank, file);
                                          absent with `data.encode: on_the_fly`

Everything but the cut into files is the same whatever the number of ranks. The ranks share the file
system of `data.prepared_dir`.
"""

import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from hetegen_rec.config.run import RunConfig, Split
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.accumulators import FieldAccumulator
from hetegen_rec.data.encoding import VOCABULARY_DIR, Encoder, vocabulary_path
from hetegen_rec.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_prepared,
    input_fingerprint,
    read_manifest,
    schema_fingerprint,
)
from hetegen_rec.data.parts import Parts
from hetegen_rec.data.raw import (
    ColumnKeys,
    DataError,
    RowGroup,
    check_columns,
    column_keys,
    expand_paths,
    group_sizes,
    is_csv,
    iter_tables,
    row_groups,
)
from hetegen_rec.data.statistics import (
    Accumulator,
    Statistics,
    summarise_table,
    write_statistics,
)
from hetegen_rec.data.workers import Workers
from hetegen_rec.files import replace_directory

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of rank 0's work: the phase, its rows done, its rows in all."""
Files: TypeAlias = dict[Split, list[str]]
Groups: TypeAlias = dict[Split, list[RowGroup]]
Fingerprints: TypeAlias = tuple[str, str]
"""Of the schema and of the input files."""

_COUNTS_DIR = "counts"


def _silent(phase: str, done: int, total: int) -> None:
    """No progress."""


def prepare(config: RunConfig, workers: Workers, progress: Progress = _silent) -> Statistics:
    """Prepares a run's data; returns at once if they are prepared from the same files already.

    Args:
        config: the run; `data` and `features` matter.
        workers: the processes that share the work; all must call.
        progress: called on rank 0 as rows are done.

    Returns:
        The statistics of the training rows.

    Raises:
        DataError: the raw data are not what the configuration says. Nothing is left behind, and
            what was prepared before stays.
    """
    with workers.together("finding the raw files"):
        files: Files = {split: expand_paths(config.data.raw_paths(split)) for split in config.splits()}
        fingerprints = schema_fingerprint(config.features), input_fingerprint(config.data, files)
    if workers.gather(_is_current(config, fingerprints))[0]:
        logger.info("%s is up to date", config.data.prepared_dir)
        return read_statistics(config)
    preparation = _Preparation(config, workers, progress, _list_groups(config, files, workers))
    with _staged(config, workers) as directory:
        preparation.write(directory, fingerprints)
    logger.info("prepared %s", config.data.prepared_dir)
    return read_statistics(config)


def read_statistics(config: RunConfig) -> Statistics:
    """The statistics of a run's prepared data.

    Raises:
        DataError: the data were not prepared, or for another schema.
    """
    check_prepared(config)
    return Statistics.load(config.data.prepared_dir)


def encode_files(
    config: RunConfig,
    patterns: Sequence[str],
    directory: Path,
    workers: Workers,
    progress: Progress = _silent,
) -> None:
    """Encodes raw files outside any split, to be scored: by what `prepare` learnt, labels not needed.

    Args:
        config: the run, prepared.
        patterns: paths and globs of the files.
        directory: where the encoded shards go, with the index of the row in the files as `__row_id`;
            removed first.
        workers: the processes that share the work; all must call.
        progress: called on rank 0 as rows are done.

    Raises:
        DataError: the run is not prepared, or the files are not what the schema says.
    """
    with workers.together("finding the files"):
        check_prepared(config)
        paths = expand_paths(patterns)
        if workers.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
    sizes = _group_sizes(paths, column_keys(config.features, labelled=False), workers)
    groups = row_groups([(path, sizes[path]) for path in paths])
    if not groups:
        raise DataError(f"no rows in {', '.join(patterns)}; name files that hold rows")
    with workers.together("encoding"):
        encoder = Encoder.load(config.data.prepared_dir, config.features)
        parts = Parts(directory, workers.rank, config.data.rows_per_group)
        rows = _raw_tables(groups, config.features, workers, "encoding", progress, labelled=False)
        for table, first_row, where in rows:
            parts.add(encoder.encode(table, first_row, where, labelled=False))
        parts.close()


def _is_current(config: RunConfig, fingerprints: Fingerprints) -> bool:
    try:
        found = read_manifest(config.data.prepared_dir)
    except DataError:
        return False
    return (found.schema_fingerprint, found.input_fingerprint) == fingerprints


def _list_groups(config: RunConfig, files: Files, workers: Workers) -> Groups:
    """The row groups of every split."""
    paths = sorted({path for paths in files.values() for path in paths})
    with workers.together("checking the raw files"):
        for path in paths:
            _check_mode(path, config)
    sizes = _group_sizes(paths, column_keys(config.features), workers)
    groups = {split: row_groups([(path, sizes[path]) for path in files[split]]) for split in files}
    for split, found in groups.items():
        if not found:
            raise DataError(
                f"split `{split}` is empty: no rows in {', '.join(config.data.raw_paths(split))}; "
                f"name files that hold rows under `data.{split}`"
            )
    return groups


def _group_sizes(paths: Sequence[str], columns: ColumnKeys, workers: Workers) -> dict[str, list[int]]:
    """Rows of each row group of files that must have the columns. Each rank reads a share of the footers."""
    sizes: dict[str, list[int]] = {}
    with workers.together("reading the raw files' footers"):
        for path in paths[workers.rank :: workers.world_size]:
            check_columns(path, columns)
            sizes[path] = group_sizes(path)
    return {path: rows for part in workers.gather(sizes) for path, rows in part.items()}


def _check_mode(path: str, config: RunConfig) -> None:
    if config.data.encode == "on_the_fly" and is_csv(path):
        raise DataError(
            f"{path}: `data.encode: on_the_fly` needs Parquet, CSV cannot be read by row group; "
            "use `prepared`"
        )


@contextmanager
def _staged(config: RunConfig, workers: Workers) -> Iterator[Path]:
    """A directory beside the final one that takes its place at the end, or goes if anything fails."""
    if "://" in config.data.prepared_dir:
        raise DataError(
            f"`data.prepared_dir: {config.data.prepared_dir}` is a URL; name a directory on a file system "
            "that all ranks share"
        )
    final = Path(config.data.prepared_dir)
    partial = final.with_name(f".{final.name}.partial")
    try:
        with workers.together("making the output directory"):
            if workers.rank == 0:
                _refuse_foreign(final)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        yield partial
        with workers.together("moving the prepared data into place"):
            if workers.rank == 0:
                replace_directory(partial, final)
    finally:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(final: Path) -> None:
    """An existing directory is replaced only if `prepare` wrote it."""
    if final.exists() and not (final / MANIFEST_FILE).exists() and any(final.iterdir()):
        raise DataError(
            f"{final}: exists and was not written by prepare; set `data.prepared_dir` to a new directory"
        )


@dataclass
class _Preparation:
    """The passes, in order, as one rank goes through them."""

    config: RunConfig
    workers: Workers
    progress: Progress
    groups: Groups

    def write(self, directory: Path, fingerprints: Fingerprints) -> None:
        """Fills the directory."""
        self._count(directory)
        self._merge(directory)
        encoded = list(self.groups) if self.config.data.encode == "prepared" else []
        if encoded:
            self._encode(directory)
        with self.workers.together("writing the manifest"):
            if self.workers.rank == 0:
                shutil.rmtree(directory / _COUNTS_DIR)
                num_rows = {split: _num_rows(groups) for split, groups in self.groups.items()}
                Manifest(*fingerprints, num_rows, encoded).write(directory)

    def _count(self, directory: Path) -> None:
        """Counts this rank's training rows into files, one a table."""
        with self.workers.together("counting the training rows"):
            accumulator = Accumulator(self.config.features)
            for table, first_row, where in self._raw_tables("train", "counting"):
                accumulator.add(table, first_row, where)
            for owner in self.config.features.table_owners:
                path = _counts_path(directory, owner.name, self.workers.rank)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Written and read within this job only.
                path.write_bytes(pickle.dumps(accumulator.of_table(owner.name)))
        totals = self.workers.gather((accumulator.num_rows, accumulator.num_positives))
        self._num_rows, self._num_positives = (sum(column) for column in zip(*totals, strict=True))

    def _merge(self, directory: Path) -> None:
        """Merges the ranks' counts of this rank's tables; rank 0 gathers what is known of the fields."""
        mine: dict[str, dict[str, Any]] = {}
        with self.workers.together("merging the counts"):
            (directory / VOCABULARY_DIR).mkdir(exist_ok=True)
            owners = self.config.features.table_owners
            for owner in owners[self.workers.rank :: self.workers.world_size]:
                mine.update(self._merge_table(directory, owner.name))
        known = {name: plain for fields in self.workers.gather(mine) for name, plain in fields.items()}
        with self.workers.together("writing the statistics"):
            if self.workers.rank == 0:
                fields = [known[name] for name in self.config.features.field_names]
                write_statistics(directory, self._num_rows, self._num_positives, fields)

    def _merge_table(self, directory: Path, table: str) -> dict[str, dict[str, Any]]:
        counted = _load_counts(directory, table, 0)
        for rank in range(1, self.workers.world_size):
            for name, other in _load_counts(directory, table, rank).items():
                counted[name].merge(other)
        vocabulary, fields = summarise_table(self.config.features, table, counted)
        if vocabulary is not None:
            vocabulary.save(vocabulary_path(directory, table))
        return {field.name: field.save(directory) for field in fields}

    def _encode(self, directory: Path) -> None:
        """Encodes this rank's rows of every split."""
        with self.workers.together("encoding"):
            encoder = Encoder.load(directory, self.config.features)
            for split in self.groups:
                (directory / split).mkdir(exist_ok=True)
                parts = Parts(directory / split, self.workers.rank, self.config.data.rows_per_group)
                for table, first_row, where in self._raw_tables(split, "encoding"):
                    parts.add(encoder.encode(table, first_row, where))
                parts.close()

    def _raw_tables(self, split: Split, phase: str) -> Iterator[tuple[pa.Table, int, str]]:
        return _raw_tables(
            self.groups[split], self.config.features, self.workers, f"{phase} {split}", self.progress
        )


def _raw_tables(
    groups: list[RowGroup],
    schema: Schema,
    workers: Workers,
    phase: str,
    progress: Progress,
    *,
    labelled: bool = True,
) -> Iterator[tuple[pa.Table, int, str]]:
    """This rank's share of the rows: tables, the index of their first row among all, and their place."""
    share = _share(groups, workers)
    total, done = _num_rows(share), 0
    if workers.rank == 0:
        logger.info("%s: %d rows over %d rank(s)", phase, _num_rows(groups), workers.world_size)
    for group in share:
        first_row = group.first_row
        for table in iter_tables(group, schema, labelled=labelled):
            yield table, first_row, group.where
            first_row += len(table)
            done += len(table)
            if workers.rank == 0:
                progress(phase, done, total)


def _share(groups: list[RowGroup], workers: Workers) -> list[RowGroup]:
    """This rank's contiguous share of the rows, cut between row groups; may be empty."""
    total = groups[-1].first_row + groups[-1].num_rows

    def rank_of(group: RowGroup) -> int:
        middle = group.first_row + group.num_rows // 2
        return middle * workers.world_size // total

    return [group for group in groups if rank_of(group) == workers.rank]


def _num_rows(groups: list[RowGroup]) -> int:
    return sum(group.num_rows for group in groups)


def _counts_path(directory: Path, table: str, rank: int) -> Path:
    return directory / _COUNTS_DIR / f"{table}-{rank:05d}.pickle"


def _load_counts(directory: Path, table: str, rank: int) -> dict[str, FieldAccumulator]:
    counted: dict[str, FieldAccumulator] = pickle.loads(_counts_path(directory, table, rank).read_bytes())
    return counted
