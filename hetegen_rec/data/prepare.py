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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config.run import RunConfig, Split
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
from hetegen_rec.data.raw import (
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

logger = logging.getLogger(__name__)

GROUPS_PER_PART = 64
"""Row groups of one encoded file."""

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


def _is_current(config: RunConfig, fingerprints: Fingerprints) -> bool:
    try:
        found = read_manifest(config.data.prepared_dir)
    except DataError:
        return False
    return (found.schema_fingerprint, found.input_fingerprint) == fingerprints


def _list_groups(config: RunConfig, files: Files, workers: Workers) -> Groups:
    """The row groups of every split. Each rank reads its share of the footers."""
    paths = sorted({path for paths in files.values() for path in paths})
    sizes: dict[str, list[int]] = {}
    with workers.together("reading the raw files' footers"):
        for path in paths[workers.rank :: workers.world_size]:
            _check_mode(path, config)
            check_columns(path, column_keys(config.features))
            sizes[path] = group_sizes(path)
    for others in workers.gather(sizes):
        sizes.update(others)
    groups = {split: row_groups([(path, sizes[path]) for path in files[split]]) for split in files}
    for split, found in groups.items():
        if not found:
            raise DataError(
                f"split `{split}` is empty: no rows in {', '.join(config.data.raw_paths(split))}; "
                f"name files that hold rows under `data.{split}`"
            )
    return groups


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
                _replace(final, partial)
    finally:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_foreign(final: Path) -> None:
    """An existing directory is replaced only if `prepare` wrote it."""
    if final.exists() and not (final / MANIFEST_FILE).exists() and any(final.iterdir()):
        raise DataError(
            f"{final}: exists and was not written by prepare; set `data.prepared_dir` to a new directory"
        )


def _replace(final: Path, partial: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


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
            for table, first_row, where in self._raw_tables("train", "counting train"):
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
                parts = _Parts(directory / split, self.workers.rank, self.config.data.rows_per_group)
                for table, first_row, where in self._raw_tables(split, f"encoding {split}"):
                    parts.add(encoder.encode(table, first_row, where))
                parts.close()

    def _raw_tables(self, split: Split, phase: str) -> Iterator[tuple[pa.Table, int, str]]:
        """This rank's rows: tables, the split's index of their first row, and their place."""
        groups = _share(self.groups[split], self.workers)
        total, done = _num_rows(groups), 0
        if self.workers.rank == 0:
            logger.info(
                "%s: %d rows over %d rank(s)", phase, _num_rows(self.groups[split]), self.workers.world_size
            )
        for group in groups:
            first_row = group.first_row
            for table in iter_tables(group, self.config.features):
                yield table, first_row, group.where
                first_row += len(table)
                done += len(table)
                if self.workers.rank == 0:
                    self.progress(phase, done, total)


class _Parts:
    """Encoded rows to files `part-RRRRR-NNNNN.parquet` with row groups of one size."""

    def __init__(self, directory: Path, rank: int, rows_per_group: int) -> None:
        self._directory = directory
        self._rank = rank
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._num_groups = 0

    def add(self, table: pa.Table) -> None:
        """Takes in rows; writes the row groups that are full."""
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._waiting_rows < self._rows_per_group:
            return
        rows = pa.concat_tables(self._waiting)
        while len(rows) >= self._rows_per_group:
            self._write(rows.slice(0, self._rows_per_group))
            rows = rows.slice(self._rows_per_group)
        self._waiting, self._waiting_rows = [rows], len(rows)

    def close(self) -> None:
        """Writes the rest."""
        if self._waiting_rows:
            self._write(pa.concat_tables(self._waiting))
        if self._writer is not None:
            self._writer.close()

    def _write(self, rows: pa.Table) -> None:
        part, group_in_part = divmod(self._num_groups, GROUPS_PER_PART)
        if group_in_part == 0:
            if self._writer is not None:
                self._writer.close()
            path = self._directory / f"part-{self._rank:05d}-{part:05d}.parquet"
            self._writer = pq.ParquetWriter(path, rows.schema, compression="zstd")
        assert self._writer is not None
        self._writer.write_table(rows, row_group_size=self._rows_per_group)
        self._num_groups += 1


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
