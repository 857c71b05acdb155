"""Raw files to statistics, vocabularies and encoded shards, on any number of ranks.

Two passes over row groups, each rank reading its own contiguous share in bounded memory: one counts
the training rows, one encodes every split. In between, the counts of each table are merged by one
rank. The output appears at `data.prepared_dir` at the end, whole, or not at all:

    manifest.json                         what this was made from, and what was left out
    statistics.json, arrays/              `Statistics`
    vocabulary/<table>.parquet            exact vocabularies
    {train,valid,test}/part-RRRRR-NNNNN.parquet   encoded rows in raw order (rank, file);
                                          absent with `data.encode: on_the_fly`
    row_groups.parquet                    with it: the usable row groups of the raw files

Everything but the cut into files is the same whatever the number of ranks. The ranks share the file
system of `data.prepared_dir`; of several jobs that prepare it at a time one does, and the others wait.

With `data.on_bad_shard: skip` a row group that cannot be used leaves no trace in what is written. One
that breaks between the passes makes them start again without it.
"""

import itertools
import logging
import pickle
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.accumulators import FieldAccumulator
from hetegen_rec.data.bad_shards import BadShard, summary, warn_of
from hetegen_rec.data.columns import ValueType
from hetegen_rec.data.encoded_rows import open_encoded_file
from hetegen_rec.data.encoding import VOCABULARY_DIR, Encoder, vocabulary_path
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.growth import KeptIds
from hetegen_rec.data.listing import Files, Groups, Listing, find_files, list_groups, look_at, require_rows
from hetegen_rec.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_prepared,
    input_fingerprint,
    read_manifest,
    schema_fingerprint,
)
from hetegen_rec.data.parts import Parts
from hetegen_rec.data.prepared import write_row_groups
from hetegen_rec.data.raw import expand_paths, row_groups
from hetegen_rec.data.row_pass import BadGroup, Progress, RowPass, num_rows_of, silent
from hetegen_rec.data.statistics import Accumulator, Statistics, write_statistics
from hetegen_rec.data.summary import KeptTable, summarise_table
from hetegen_rec.data.workers import Workers, staged
from hetegen_rec.files import make_empty
from hetegen_rec.locks import LockedError, directory_lock
from hetegen_rec.sealing import digest_of

logger = logging.getLogger(__name__)

Fingerprints: TypeAlias = tuple[str, str]
"""Of the schema and of the input files."""

_COUNTS_DIR = "counts"
_SECONDS_BETWEEN_TRIES = 1.0
_TRIES_BETWEEN_LINES = 30


def prepare(config: RunConfig, workers: Workers, progress: Progress = silent) -> Statistics:
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
    files, fingerprints = _find_files(config, workers)
    if not workers.broadcast(_is_current(config, fingerprints)):
        with _one_job(config, workers):
            # Another job may have prepared the same while this one waited.
            if not workers.broadcast(_is_current(config, fingerprints)):
                _prepare(config, workers, progress, files, fingerprints)
    if workers.rank == 0:
        _tell(config)
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
    progress: Progress = silent,
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
            make_empty(directory)
    looked_at = look_at(paths, config.features, workers, labelled=False)
    groups = row_groups([(path, looked_at[path].group_rows or ()) for path in paths])
    if not groups:
        raise DataError(f"no rows in {', '.join(patterns)}; name files that hold rows")
    with workers.together("encoding"):
        encoder = Encoder.load(config.data.prepared_dir, config.features)
        parts = Parts(directory, workers.rank, config.data.rows_per_group, open_encoded_file)

        def encode(table: pa.Table, first_row: int, where: str) -> None:
            parts.add(encoder.encode(table, first_row, where, labelled=False))

        RowPass(config.features, workers, progress, labelled=False).read(groups, "encoding", encode)
        parts.close()


def _find_files(config: RunConfig, workers: Workers) -> tuple[Files, Fingerprints]:
    """Rank 0's view of the files, for all: they may change while the ranks look."""
    found = None
    with workers.together("finding the raw files"):
        if workers.rank == 0:
            files = find_files(config)
            kept = KeptIds(config.data, config.features).described
            of_input = input_fingerprint(config.data, files, kept)
            found = files, (schema_fingerprint(config.features), of_input)
    of_rank_0: tuple[Files, Fingerprints] = workers.broadcast(found)
    return of_rank_0


def _prepare(
    config: RunConfig, workers: Workers, progress: Progress, files: Files, fingerprints: Fingerprints
) -> None:
    try:
        listing = list_groups(config, files, workers)
        preparation = _Preparation(config, workers, progress, listing, fingerprints)
        final = _final_directory(config)
        with workers.together("looking at data.prepared_dir"):
            if workers.rank == 0:
                _refuse_foreign(final)
        with staged(final, workers) as directory:
            preparation.write(directory)
    except BadRowsError as error:
        raise BadRowsError(f"{error}; or leave out such rows with `data.on_bad_shard: skip`") from error


def _tell(config: RunConfig) -> None:
    skipped = read_manifest(config.data.prepared_dir).skipped
    if skipped:
        logger.warning("%s is prepared; %s", config.data.prepared_dir, summary(skipped))
    else:
        logger.info("%s is prepared", config.data.prepared_dir)


def _is_current(config: RunConfig, fingerprints: Fingerprints) -> bool:
    try:
        found = read_manifest(config.data.prepared_dir)
    except DataError:
        return False
    if found.skipped and config.data.on_bad_shard == "stop":
        return False
    return (found.schema_fingerprint, found.input_fingerprint) == fingerprints


@contextmanager
def _one_job(config: RunConfig, workers: Workers) -> Iterator[None]:
    """Context in which no other job writes `data.prepared_dir`; waits for one that does. A collective.

    The ranks wait in many short collectives, because a long one would run into the job's time limit.
    """
    if "://" in config.data.prepared_dir:
        raise DataError(
            f"`data.prepared_dir: {config.data.prepared_dir}` is a URL; name a directory on a file system "
            "that all ranks share"
        )
    with ExitStack() as held:
        for attempt in itertools.count():
            locked_by = None
            with workers.together("locking data.prepared_dir"):
                if workers.rank == 0:
                    locked_by = _try_lock(config, held)
            if workers.broadcast(locked_by) is None:
                break
            if workers.rank == 0 and attempt % _TRIES_BETWEEN_LINES == 0:
                logger.info("waiting for another job that prepares the same data: %s", locked_by)
            time.sleep(_SECONDS_BETWEEN_TRIES)
        yield


def _try_lock(config: RunConfig, held: ExitStack) -> str | None:
    """Takes the lock, or says who has it."""
    try:
        held.enter_context(directory_lock(_final_directory(config)))
    except LockedError as error:
        return str(error)
    return None


def _final_directory(config: RunConfig) -> Path:
    """`data.prepared_dir` without symbolic links, because it is replaced by renaming."""
    return Path(config.data.prepared_dir).resolve()


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
    listing: Listing
    fingerprints: Fingerprints
    skipped: list[BadShard] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._groups: Groups = self.listing.groups
        self._leave_out(self.listing.bad)
        skip = self.config.data.on_bad_shard == "skip"
        self._rows = RowPass(self.config.features, self.workers, self.progress, skip=skip)

    def write(self, directory: Path) -> None:
        """Fills the directory."""
        encoded = list(self._groups) if self.config.data.encode == "prepared" else []
        while not self._fill(directory, encoded):
            with self.workers.together("starting again"):
                if self.workers.rank == 0:
                    logger.warning("training rows became unusable after they were counted; counting again")
                    make_empty(directory)
        with self.workers.together("writing the manifest"):
            if self.workers.rank == 0:
                shutil.rmtree(directory / _COUNTS_DIR)
                if not encoded:
                    write_row_groups(directory, self._groups)
                num_rows = {split: num_rows_of(groups) for split, groups in self._groups.items()}
                identity = (*self.fingerprints, self._statistics_fingerprint, self._identity)
                Manifest(*identity, num_rows, encoded, self.skipped).write(directory)

    def _fill(self, directory: Path, encoded: Sequence[Split]) -> bool:
        """The passes; False as soon as rows that were counted turn out unusable."""
        self._count(directory)
        self._merge(directory)
        self._identify(directory)
        for split in encoded:
            num_bad = self._encode(directory, split)
            if num_bad and split == "train":
                return False
        return True

    def _count(self, directory: Path) -> None:
        """Counts this rank's training rows into files, one a table."""
        with self.workers.together("counting the training rows"):
            accumulator = Accumulator(self.config.features, self._expected_types())
            bad = self._rows.read(self._groups["train"], "counting train", accumulator.add)
            for owner in self.config.features.table_owners:
                path = _counts_path(directory, owner.name, self.workers.rank)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Written and read within this job only.
                path.write_bytes(pickle.dumps(accumulator.of_table(owner.name)))
        self._leave_out_groups("train", bad)
        totals = self.workers.gather((accumulator.num_rows, accumulator.num_positives))
        self._num_rows, self._num_positives = (sum(column) for column in zip(*totals, strict=True))

    def _expected_types(self) -> dict[str, ValueType]:
        """Skipping, a type that differs must not depend on which rows a rank sees first."""
        return self.listing.stored_types if self._rows.skip else {}

    def _merge(self, directory: Path) -> None:
        """Merges the ranks' counts of this rank's tables; rank 0 gathers what is known of the fields."""
        mine: dict[str, dict[str, Any]] = {}
        with self.workers.together("merging the counts"):
            (directory / VOCABULARY_DIR).mkdir(exist_ok=True)
            kept = KeptIds(self.config.data, self.config.features)
            owners = self.config.features.table_owners
            for owner in owners[self.workers.rank :: self.workers.world_size]:
                mine.update(self._merge_table(directory, owner.name, kept.of_table(owner.name)))
        known = {name: plain for fields in self.workers.gather(mine) for name, plain in fields.items()}
        with self.workers.together("writing the statistics"):
            if self.workers.rank == 0:
                fields = [known[name] for name in self.config.features.field_names]
                write_statistics(directory, self._num_rows, self._num_positives, fields)

    def _merge_table(self, directory: Path, table: str, kept: KeptTable | None) -> dict[str, dict[str, Any]]:
        counted = _load_counts(directory, table, 0)
        for rank in range(1, self.workers.world_size):
            for name, other in _load_counts(directory, table, rank).items():
                counted[name].merge(other)
        vocabulary, fields = summarise_table(self.config.features, table, counted, kept)
        if vocabulary is not None:
            vocabulary.save(vocabulary_path(directory, table))
        return {field.name: field.save(directory) for field in fields}

    def _identify(self, directory: Path) -> None:
        """Names this preparation after all that decides about ids, and about which rows are in which file."""
        with self.workers.together("reading the statistics"):
            self._statistics_fingerprint = Statistics.load(directory).fingerprint
        described = [*self.fingerprints, self._statistics_fingerprint, self.workers.world_size]
        self._identity = digest_of(described)

    def _encode(self, directory: Path, split: Split) -> int:
        """Encodes this rank's rows of a split; returns how many row groups of all ranks could not be."""
        with self.workers.together(f"encoding {split}"):
            encoder = Encoder.load(directory, self.config.features)
            (directory / split).mkdir(exist_ok=True)
            parts = Parts(
                directory / split,
                self.workers.rank,
                self.config.data.rows_per_group,
                open_encoded_file,
                self._identity,
            )

            def encode(table: pa.Table, first_row: int, where: str) -> None:
                parts.add(encoder.encode(table, first_row, where))

            bad = self._rows.read(self._groups[split], f"encoding {split}", encode)
            parts.close()
        return self._leave_out_groups(split, bad)

    def _leave_out_groups(self, split: Split, bad: Sequence[BadGroup]) -> int:
        """Leaves out every rank's bad row groups of a split from now on; returns how many. A collective."""
        of_all = [found for of_rank in self.workers.gather(bad) for found in of_rank]
        gone = {group for group, _ in of_all}
        self._groups[split] = [group for group in self._groups[split] if group not in gone]
        shards = [BadShard(split, group.where, group.num_rows, reason) for group, reason in of_all]
        require_rows(self.config, split, self._groups[split], shards)
        self._leave_out(shards)
        return len(shards)

    def _leave_out(self, shards: Sequence[BadShard]) -> None:
        if self.workers.rank == 0:
            warn_of(shards, num_told=len(self.skipped))
        self.skipped += shards


def _counts_path(directory: Path, table: str, rank: int) -> Path:
    return directory / _COUNTS_DIR / f"{table}-{rank:05d}.pickle"


def _load_counts(directory: Path, table: str, rank: int) -> dict[str, FieldAccumulator]:
    counted: dict[str, FieldAccumulator] = pickle.loads(_counts_path(directory, table, rank).read_bytes())
    return counted
