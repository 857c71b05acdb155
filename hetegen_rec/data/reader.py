"""Reads a split as batches: row plan -> row groups -> windows, shuffled -> batches, each stage ahead.

Two threads work behind every epoch. One reads (and on the fly encodes) the next window of each lane
while the current one is served; the other cuts windows into steps and makes batches of them.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from threading import Event
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig, Split
from hetegen_rec.data.batch import Batch, Cursor
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.encoding import Encoder, required_columns
from hetegen_rec.data.hashing import mix64
from hetegen_rec.data.prefetch import prefetch
from hetegen_rec.data.raw import DataError, RowGroup, list_row_groups, read_row_group
from hetegen_rec.data.row_plan import Interval, RowPlan, Window, lanes_of
from hetegen_rec.data.statistics import Statistics

SEQUENTIAL_WINDOW_ROWS = 65_536
"""Rows of a lane read at a time where nothing is shuffled."""

Encode: TypeAlias = Callable[[pa.Table, int, str], pa.Table]
"""Raw rows, the index of the first one in its split, and their place for errors -> encoded rows."""


class Reader:
    """One rank's share of a split, as batches."""

    def __init__(
        self,
        row_groups: Sequence[RowGroup],
        batcher: Batcher,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        num_lanes: int,
        seed: int,
        shuffle: bool,
        shuffle_rows: int,
        prefetch_batches: int,
        pad: bool,
        columns: Sequence[str],
        encode: Encode | None = None,
    ):
        """Checks that the split can be shared out; reads nothing yet.

        Args:
            row_groups: all row groups of the split, the same list on every rank.
            batcher: makes batches of encoded rows.
            rank: this process.
            world_size: number of processes; it must divide `num_lanes`.
            batch_size: rows of a step over all ranks; `num_lanes` must divide it.
            num_lanes: equal shares of an epoch (see `row_plan`).
            seed: of the shuffle and of the noise.
            shuffle: whether every epoch has its own order.
            shuffle_rows: rows of a lane among which to shuffle. Twice as many are held.
            prefetch_batches: batches made ahead.
            pad: evaluation: keep every row and fill up with padding, instead of leaving out the
                rows that do not fill all lanes.
            columns: columns to read from the row groups.
            encode: encodes rows as they are read; None for encoded shards.

        Raises:
            ConfigError: lanes that cannot be shared by the ranks, or a batch by the lanes.
            DataError: no rows, or in training fewer rows than lanes.
        """
        if batch_size % num_lanes:
            raise ConfigError(
                f"a batch of {batch_size} rows cannot be shared equally by {num_lanes} lanes (one a rank "
                f"unless `data.lanes` is set); set `train.batch_size` to a multiple of {num_lanes}"
            )
        self._row_groups = list(row_groups)
        self._batcher = batcher
        self._lanes = lanes_of(rank, world_size, num_lanes)
        self._num_lanes = num_lanes
        self._rows_per_step = batch_size // num_lanes
        self._seed = seed
        self._shuffle = shuffle
        self._window_rows = shuffle_rows if shuffle else SEQUENTIAL_WINDOW_ROWS
        self._prefetch_batches = prefetch_batches
        self._pad = pad
        self._columns = list(columns)
        self._encode = encode
        plan = self._plan(epoch=0)
        self.num_rows = plan.num_rows
        """Rows of the split."""
        self.rows_per_lane = plan.rows_per_lane
        """Rows that each lane hands out in an epoch, padding included."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an undisturbed epoch, the same on every rank; the last one may be smaller."""
        return -(-self.rows_per_lane // self._rows_per_step)

    def epoch(self, epoch: int, start_rows_per_lane: int = 0) -> Iterator[Batch]:
        """A fresh iterator over one epoch, with threads of its own that end with it.

        Args:
            epoch: from 0; the same epoch has the same batches every time.
            start_rows_per_lane: where to start, as in the `cursor` of the last batch that was used.

        Raises:
            ValueError: the start lies behind the end of the lanes.
            DataError: from the iterator, where rows cannot be read or encoded.
        """
        if not 0 <= start_rows_per_lane <= self.rows_per_lane:
            raise ValueError(
                f"cannot start at row {start_rows_per_lane} of lanes with {self.rows_per_lane} rows; the "
                "cursor was made with other data or another number of lanes"
            )
        return self._stream(self._plan(epoch), epoch, start_rows_per_lane)

    def _plan(self, epoch: int) -> RowPlan:
        return RowPlan(
            self._row_groups,
            num_lanes=self._num_lanes,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            window_rows=self._window_rows,
            pad=self._pad,
        )

    def _stream(self, plan: RowPlan, epoch: int, start: int) -> Iterator[Batch]:
        abandoned = Event()
        windows = prefetch(self._windows(plan, start, abandoned), depth=1)
        try:
            yield from prefetch(self._batches(windows, epoch, start), self._prefetch_batches)
        finally:
            abandoned.set()

    def _windows(self, plan: RowPlan, start: int, abandoned: Event) -> Generator[list[pa.Table], None, None]:
        """The encoded rows of one window after another: a table for each of this rank's lanes."""
        lanes = [_Lane(self._columns, self._encode, self._batcher, abandoned) for _ in self._lanes]
        first, skipped = divmod(start, plan.window_rows)
        for index in range(first, plan.num_windows):
            tables = [
                lane.read(plan.window(number, index)) for number, lane in zip(self._lanes, lanes, strict=True)
            ]
            yield [table.slice(skipped) for table in tables]
            skipped = 0

    def _batches(
        self, windows: Generator[list[pa.Table], None, None], epoch: int, start: int
    ) -> Generator[Batch, None, None]:
        noise_seed = int(mix64(np.array([epoch], dtype=np.int64), self._seed)[0] >> np.uint64(1))
        position = start
        with closing(windows):
            for tables in _steps(windows, self._rows_per_step):
                num_rows = tables[0].num_rows
                position += num_rows
                yield self._batcher.make(
                    pa.concat_tables(tables),
                    self._strata(num_rows),
                    noise_seed,
                    Cursor(epoch, position),
                )

    def _strata(self, rows_per_lane: int) -> NDArray[np.float32]:
        """Places of this rank's rows in the global batch: its lanes side by side, in order."""
        places = np.arange(self._lanes.start * rows_per_lane, self._lanes.stop * rows_per_lane)
        return ((places + 0.5) / (self._num_lanes * rows_per_lane)).astype(np.float32)


class _Lane:
    """Reads the windows of one lane, in order."""

    def __init__(
        self,
        columns: Sequence[str],
        encode: Encode | None,
        batcher: Batcher,
        abandoned: Event,
    ):
        self._columns = columns
        self._encode = encode
        self._batcher = batcher
        self._abandoned = abandoned
        # A row group that reaches over the end of a window is not read twice.
        self._group: RowGroup | None = None
        self._group_table: pa.Table | None = None

    def read(self, window: Window) -> pa.Table:
        """The encoded rows of a window, in the order to hand them out, padding last."""
        parts = [self._read_interval(interval) for interval in window.intervals]
        if window.num_padding:
            parts.append(self._batcher.padding(window.num_padding))
        table = pa.concat_tables(parts)
        del parts
        return table if window.order is None else _reordered(table, window)

    def _read_interval(self, interval: Interval) -> pa.Table:
        if self._abandoned.is_set():
            raise _AbandonedError
        group, start = interval.group, interval.start
        try:
            rows = self._read_group(group).slice(start, interval.num_rows)
            if self._encode is not None:
                rows = self._encode(rows, group.first_row + start, group.where)
            return _conform(rows, self._batcher.encoded_schema, group.where)
        except DataError:
            raise
        except Exception as error:
            place = f"{group.where}, rows {start} to {interval.stop}"
            raise RuntimeError(f"{place}: reading failed: {type(error).__name__}: {error}") from error

    def _read_group(self, group: RowGroup) -> pa.Table:
        if group != self._group:
            self._group_table = None
            self._group_table = read_row_group(group, self._columns)
            self._group = group
        return self._group_table


class _AbandonedError(Exception):
    """Nobody waits for the rows any more; it ends the reading thread and goes no further."""


def open_reader(
    config: RunConfig,
    split: Split,
    statistics: Statistics,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    train: bool,
    seed: int,
    oov_dropout: float,
    encoder: Encoder | None = None,
) -> Reader:
    """Opens one split of a prepared data set; reads the footers of its files.

    Training takes `data.lanes` lanes and leaves out what does not fill them. Evaluation takes one
    lane a rank, every row once, and rounds `batch_size` up to a multiple of the ranks.

    Args:
        config: the run.
        split: which rows.
        statistics: of the training rows.
        rank: this process.
        world_size: number of processes.
        batch_size: rows of a step over all ranks.
        train: whether to train on the rows, or to evaluate them.
        seed: of the shuffle and of the noise.
        oov_dropout: see `Batcher`.
        encoder: encodes raw rows; needed if and only if `data.encode` is `on_the_fly`.

    Raises:
        ConfigError: lanes, ranks and batch size do not fit each other.
        DataError: no files, damaged files, no rows, or in training fewer rows than lanes.
    """
    data = config.data
    if (data.encode == "on_the_fly") != (encoder is not None):
        raise ValueError(f"`data.encode: {data.encode}` and encoder {encoder!r} do not fit")
    batcher = Batcher(config.features, statistics, oov_dropout)
    if encoder is None:
        patterns: Sequence[str] = (f"{data.prepared_dir.rstrip('/')}/{split}/*.parquet",)
        columns: Sequence[str] = batcher.encoded_schema.names
    else:
        patterns, columns = data.raw_paths(split), required_columns(config.features)
    num_lanes = (data.lanes or world_size) if train else world_size
    if not train:
        batch_size = -(-batch_size // num_lanes) * num_lanes
    return Reader(
        list_row_groups(patterns),
        batcher,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        num_lanes=num_lanes,
        seed=seed,
        shuffle=train and data.shuffle,
        shuffle_rows=data.shuffle_rows,
        prefetch_batches=data.prefetch_batches,
        pad=not train,
        columns=columns,
        encode=encoder.encode if encoder is not None else None,
    )


def _steps(windows: Iterator[list[pa.Table]], rows_per_step: int) -> Iterator[list[pa.Table]]:
    """Cuts the lanes' windows, laid end to end, into steps; the last one may be smaller."""
    held: list[pa.Table] = []
    for tables in windows:
        held = [pa.concat_tables(pair) for pair in zip(held, tables, strict=True)] if held else tables
        while held[0].num_rows >= rows_per_step:
            yield [table.slice(0, rows_per_step) for table in held]
            held = [table.slice(rows_per_step) for table in held]
    if held and held[0].num_rows:
        yield held


def _reordered(table: pa.Table, window: Window) -> pa.Table:
    """The real rows of a window in its order, then the padding."""
    num_real = table.num_rows - window.num_padding
    padding = np.arange(num_real, table.num_rows)
    indices = pa.array(np.concatenate([window.order, padding]))
    # Column by column, so that only one column is held a third time.
    columns = [column.combine_chunks().take(indices) for column in table.columns]
    return pa.table(columns, schema=table.schema)


def _conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table's columns as the encoded schema has them, whatever the file calls its types."""
    if table.schema.equals(schema):
        return table
    missing = set(schema.names) - set(table.column_names)
    if missing:
        raise DataError(f"{where}: no encoded column {min(missing)!r}; run prepare again")
    return table.select(schema.names).cast(schema)
