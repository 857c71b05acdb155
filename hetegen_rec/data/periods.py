"""A raw log cut into periods in time order, on any number of ranks, in bounded memory.

Two passes over the raw files of all splits: one learns when the rows were, one copies them to

    cut.json                                the periods, and what they were cut from
    period-NN/{early,late}/{0-train,1-valid,2-test}/types-*/part-*.parquet
                                            raw rows in the columns of the schema, in their order

`late` is the newest share of a period. It validates the model of its period and is trained on with the next
one, so no model is chosen by rows that it is tested on, and no row is lost to training.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.incremental import FEWEST_UPDATES, IncrementalConfig
from hetegen_rec.config.run import RunConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.accumulators import Histogram
from hetegen_rec.data.columns import timestamps
from hetegen_rec.data.errors import BadRowsError, DataError
from hetegen_rec.data.listing import Files, Groups, find_files, list_groups
from hetegen_rec.data.manifest import input_fingerprint
from hetegen_rec.data.raw import RowGroup, list_row_groups
from hetegen_rec.data.raw_parts import RawParts, raw_pattern
from hetegen_rec.data.row_pass import Progress, RowPass, Use, silent
from hetegen_rec.data.workers import Workers, staged

logger = logging.getLogger(__name__)

Part: TypeAlias = Literal["early", "late"]

CUT_FILE = "cut.json"
MOST_PERIODS = 1000
"""More are a length in the wrong unit."""

_PARTS: tuple[Part, Part] = ("early", "late")


@dataclass(frozen=True)
class Period:
    """Consecutive rows of the log. Times are in the unit of the timestamp column."""

    number: int
    """From 1."""
    start: int
    """Time of its first row, or before."""
    late_from: int
    """From when on its rows are `late`."""
    end: int
    """Time before which its rows are."""
    early_rows: int
    late_rows: int

    @property
    def num_rows(self) -> int:
        """Rows of both parts."""
        return self.early_rows + self.late_rows

    def rows_of(self, part: Part) -> int:
        """Rows of one part."""
        return self.early_rows if part == "early" else self.late_rows


@dataclass(frozen=True)
class Periods:
    """A log in periods, as files."""

    directory: Path
    periods: tuple[Period, ...]

    @property
    def last(self) -> int:
        """Number of the last period."""
        return len(self.periods)

    def files(self, number: int, *parts: Part) -> list[str]:
        """Globs of the raw rows of some parts of a period, by default both; in order of time."""
        num_rows = self.periods[number - 1].rows_of
        return [
            raw_pattern(_part_directory(self.directory, number, part), "*/")
            for part in parts or _PARTS
            if num_rows(part)
        ]

    def new_files(self, number: int) -> list[str]:
        """What the model of a period trains on and that of the period before did not."""
        before = self.files(number - 1, "late") if number > 1 else []
        return [*before, *self.files(number, "early")]

    def files_up_to(self, number: int) -> list[str]:
        """All that the model of a period may train on."""
        return [files for one in range(1, number + 1) for files in self.new_files(one)]


def cut_periods(config: RunConfig, directory: Path, workers: Workers, progress: Progress = silent) -> Periods:
    """Cuts the raw files of a run into periods; returns at once if that was done before.

    Args:
        config: the run; `data`, `features` and `incremental` matter. Rows of all splits are cut.
        directory: appears whole, or not at all.
        workers: the processes that share the work; all must call.
        progress: called on rank 0 as rows are done.

    Raises:
        ConfigError: the schema has no timestamp, or the log is too short for such periods.
        DataError: a period without rows, rows without a time, or the log was cut before from other files.
    """
    if config.features.timestamp is None:
        raise ConfigError(
            "training over periods needs `features.timestamp`: the column with the time of a row; the schema "
            "names none"
        )
    files, cut_from, known = _find(config, directory, workers)
    if known is None:
        groups = list_groups(config, files, workers).groups
        cutting = _Cutting(config, groups, workers, progress)
        with staged(directory, workers) as partial:
            known = cutting.write(partial)
            with workers.together("writing the periods' manifest"):
                if workers.rank == 0:
                    content = {**cut_from, "periods": [asdict(period) for period in known]}
                    (partial / CUT_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Periods(directory, known)


def row_groups_in(patterns: Sequence[str], workers: Workers) -> list[RowGroup]:
    """The row groups of cut files, from their footers, as rank 0 finds them. A collective."""
    found: list[RowGroup] | None = None
    with workers.together("reading the cut files' footers"):
        if workers.rank == 0:
            found = list_row_groups(patterns)
    groups: list[RowGroup] = workers.broadcast(found)
    return groups


def _part_directory(directory: Path, number: int, part: Part) -> Path:
    return directory / f"period-{number:02d}" / part


def _find(
    config: RunConfig, directory: Path, workers: Workers
) -> tuple[Files, dict[str, Any], tuple[Period, ...] | None]:
    """The raw files, what they are told by, and the periods that lie there; as rank 0 sees them.

    Files may appear while the ranks look.
    """
    found = None
    with workers.together("finding the raw files"):
        if workers.rank == 0:
            files = find_files(config)
            cut_from = _described(config, files)
            found = files, cut_from, _read_cut(directory, cut_from)
    of_rank_0: tuple[Files, dict[str, Any], tuple[Period, ...] | None] = workers.broadcast(found)
    return of_rank_0


def _described(config: RunConfig, files: Files) -> dict[str, Any]:
    incremental = config.incremental
    return {
        "input": input_fingerprint(config.data, files, {}),
        "columns": config.features.model_dump(mode="json"),
        "periods_wanted": incremental.periods,
        "period_length": incremental.period_length,
        "valid_share": incremental.valid_share,
    }


def _read_cut(directory: Path, cut_from: Mapping[str, Any]) -> tuple[Period, ...] | None:
    """The periods that lie there; None if there are none.

    Raises:
        DataError: they were cut from something else.
    """
    path = directory / CUT_FILE
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in cut_from.items() if content.get(key) != value]
    if changed:
        names = {"input": "the raw files", "columns": "`features`", "periods_wanted": "`incremental.periods`"}
        told = ", ".join(names.get(key, f"`incremental.{key}`") for key in changed)
        raise DataError(
            f"{directory}: periods that were cut before {told} changed; restore that, set another "
            "`run_dir`, or replace everything that was trained on them with --fresh"
        )
    return tuple(Period(**values) for values in content["periods"])


@dataclass
class _Times:
    """When the rows of a log were."""

    histogram: Histogram = field(default_factory=Histogram)
    first: int | None = None
    last: int | None = None

    def add(self, times: NDArray[np.int64]) -> None:
        self._widen(int(times.min()), int(times.max()))
        self.histogram.add(pa.array(times.astype(np.float64)))

    def merge(self, other: "_Times") -> None:
        if other.first is not None and other.last is not None:
            self._widen(other.first, other.last)
            self.histogram.merge(other.histogram)

    def quantiles(self, shares: Sequence[float]) -> list[int]:
        """Times before which about these shares of the rows lie, ascending, each once."""
        cumulative = np.cumsum(self.histogram.counts)
        cells = np.searchsorted(cumulative, cumulative[-1] * np.asarray(shares), side="right")
        starts = self.histogram.starts[np.unique(cells[cells > 0])]
        return [math.ceil(start) for start in starts]

    def _widen(self, first: int, last: int) -> None:
        self.first = first if self.first is None else min(first, self.first)
        self.last = last if self.last is None else max(last, self.last)


@dataclass
class _Cutting:
    """The two passes, as one rank goes through them."""

    config: RunConfig
    groups: Groups
    workers: Workers
    progress: Progress

    def write(self, directory: Path) -> tuple[Period, ...]:
        """Fills the directory; returns the periods with their rows."""
        times = self._look()
        edges = _edges(self.config.incremental, times)
        counts = self._copy(directory, edges)
        bounds = [times.first or 0, *edges, (times.last or 0) + 1]
        periods = tuple(
            Period(
                number=first // 2 + 1,
                start=bounds[first],
                late_from=bounds[first + 1],
                end=bounds[first + 2],
                early_rows=counts[first],
                late_rows=counts[first + 1],
            )
            for first in range(0, len(counts), 2)
        )
        _require_rows(periods)
        return periods

    def _look(self) -> _Times:
        """The first pass: the times of all rows, over all ranks."""
        schema, times = self.config.features, _Times()
        # No other column has to be read for that.
        narrow = Schema(label=schema.label, timestamp=schema.timestamp, fields=schema.table_owners[:1])
        with self.workers.together("reading the times of the rows"):
            self._pass(narrow, "times of", lambda _: lambda *rows: times.add(_times_of(schema, *rows)))
        all_times = _Times()
        for part in self.workers.gather(times):
            all_times.merge(part)
        return all_times

    def _copy(self, directory: Path, edges: Sequence[int]) -> list[int]:
        """The second pass: copies every row to its part; returns the rows of each over all ranks."""
        limits = np.asarray(edges, np.int64)
        writers = {
            split: [self._writer(directory, place, f"{order}-{split}") for place in range(len(edges) + 1)]
            for order, split in enumerate(self.groups)
        }
        with self.workers.together("cutting the log into periods"):
            self._pass(
                self.config.features,
                "cutting",
                lambda split: partial(self._share_out, limits, writers[split]),
            )
            for writer in (one for of_split in writers.values() for one in of_split):
                writer.close()
        mine = [[writer.num_rows for writer in of_split] for of_split in writers.values()]
        counts = [of_split for of_rank in self.workers.gather(mine) for of_split in of_rank]
        return [sum(of_part) for of_part in zip(*counts, strict=True)]

    def _writer(self, directory: Path, place: int, split: str) -> RawParts:
        part = _part_directory(directory, place // 2 + 1, _PARTS[place % 2])
        return RawParts(part / split, self.workers.rank, self.config.data.rows_per_group)

    def _share_out(
        self,
        limits: NDArray[np.int64],
        writers: Sequence[RawParts],
        table: pa.Table,
        first_row: int,
        where: str,
    ) -> None:
        """Writes every row to its part: the one whose index is the number of limits that are not above it."""
        times = _times_of(self.config.features, table, first_row, where)
        places = np.searchsorted(limits, times, side="right")
        for place in np.unique(places):
            writers[place].add(table.filter(pa.array(places == place)))

    def _pass(self, schema: Schema, what: str, use: Callable[[Split], Use]) -> None:
        """Hands this rank's share of every split's rows to what `use` says for the split."""
        skip = self.config.data.on_bad_shard == "skip"
        rows = RowPass(schema, self.workers, self.progress, skip=skip)
        for split, groups in self.groups.items():
            for _, reason in rows.read(groups, f"{what} {split}", use(split)):
                logger.warning("left out of the periods: %s", reason)


def _times_of(schema: Schema, table: pa.Table, first_row: int, where: str) -> NDArray[np.int64]:
    """[B] times of raw rows, none of them missing."""
    missing = pc.is_null(table.column(schema.timestamp))
    if pc.any(missing).as_py():
        row = first_row + pc.index(missing, True).as_py()
        raise BadRowsError(
            f"{where}: timestamp column {schema.timestamp!r}: row {row} of the split has no time, so it "
            "belongs to no period; give it one, or drop it"
        )
    return timestamps(table, schema, where)


def _edges(config: IncrementalConfig, times: _Times) -> list[int]:
    """Where parts end and others begin: early 1, late 1, early 2, and so on; ascending."""
    if times.first is None or times.last is None:
        raise DataError("no usable row has a time, so there is nothing to cut into periods")
    held = config.valid_share
    if config.period_length is None:
        wanted = config.periods
        shares = [(number - held * late) / wanted for number in range(1, wanted + 1) for late in (1, 0)]
        edges = times.quantiles(shares[:-1])
        if len(edges) < len(shares) - 1:
            raise DataError(
                f"`incremental.periods: {wanted}`: the rows lie at too few different times for so many "
                "periods; use fewer"
            )
        return edges
    length = config.period_length
    count = (times.last - times.first) // length + 1
    _check_count(config, count, times)
    ends = [times.first + number * length for number in range(1, count + 1)]
    late = max(1, round(held * length))
    return [edge for end in ends for edge in (end - late, end)][:-1]


def _check_count(config: IncrementalConfig, count: int, times: _Times) -> None:
    fewest = config.first_periods + FEWEST_UPDATES
    if fewest <= count <= MOST_PERIODS:
        return
    raise ConfigError(
        f"`incremental.period_length: {config.period_length}` cuts the log, from {times.first} to "
        f"{times.last}, into {count} period(s), but {fewest} to {MOST_PERIODS} are wanted; the length is in "
        "the unit of the timestamp column"
    )


def _require_rows(periods: Sequence[Period]) -> None:
    """Raises DataError for a part without rows; the last period is only tested on, so its parts are one."""
    for period in periods:
        empty = [part for part in _PARTS if not period.rows_of(part)]
        if empty and (period.number < len(periods) or not period.num_rows):
            raise DataError(
                f"period {period.number} of {len(periods)}, from {period.start} to {period.end}, has no "
                f"{empty[0]} rows; use longer periods (`incremental.periods`, "
                "`incremental.period_length`) or another `incremental.valid_share`"
            )
