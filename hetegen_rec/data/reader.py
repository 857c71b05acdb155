"""Reads a split as batches: row plan -> row groups -> windows, shuffled -> batches, each stage ahead.

Two threads work behind every epoch. One reads (and on the fly encodes) the next window of rows of each
lane while the current one is served; the other cuts windows into steps and makes batches of them.
"""

import heapq
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from threading import Event
from typing import Protocol, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import Frequency, RunConfig
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoding import Encoder, required_columns
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.hashing import mix64
from hetegen_rec.data.interval_reader import Encode, IntervalReader, SkipLog, SkippedRows
from hetegen_rec.data.lanes import Lanes, cut
from hetegen_rec.data.prefetch import prefetch
from hetegen_rec.data.prepared import prepared_row_groups
from hetegen_rec.data.raw import RowGroup
from hetegen_rec.data.row_plan import Piece, RowPlan, lanes_of, split_of
from hetegen_rec.data.statistics import Statistics

SEQUENTIAL_WINDOW_ROWS = 65_536
"""Rows of a lane read at a time where nothing is shuffled."""


class BatchSource(Protocol):
    """Where a trainer takes its batches from: a `Reader`, or whatever hands out batches as it does."""

    num_rows: int

    @property
    def skipped(self) -> list[SkippedRows]:
        """Rows left out so far."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an undisturbed epoch."""

    def batches_left(self, cursor: Cursor) -> int:
        """Batches of `epoch(cursor)`."""

    def epoch(self, cursor: Cursor) -> Iterator[Batch]:
        """A fresh iterator over the rest of an epoch."""


class Reader:
    """One rank's share of a split, as batches. Every row of the split comes exactly once an epoch."""

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
        columns: Sequence[str],
        encode: Encode | None = None,
        skip_bad: bool = False,
        device: torch.device | None = None,
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
            columns: columns to read from the row groups.
            encode: encodes rows as they are read; None for encoded shards.
            skip_bad: put padding in the place of rows that cannot be read or encoded, and note them in
                `skipped`, instead of raising an error. It is an error still when they are more than half
                of this rank's rows in an epoch, and more than two row groups.
            device: where batches go. For CUDA they are made in pinned memory, from which they are copied
                while the device computes; default: the CPU.

        Raises:
            ConfigError: lanes that cannot be shared by the ranks, or a batch by the lanes.
            DataError: no rows.
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
        self._columns = list(columns)
        self._encode = encode
        self._skip_bad = skip_bad
        self._pins_for = device if device is not None and device.type == "cuda" else None
        self._skip_log = SkipLog()
        self.num_rows = self._plan(Cursor().on_lanes(num_lanes)).num_rows
        """Rows of the split."""

    @property
    def skipped(self) -> list[SkippedRows]:
        """Rows that this rank has left out so far, once for every time that they were to be read."""
        return self._skip_log.rows

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an undisturbed epoch, the same on every rank; the last one may be smaller."""
        return self.batches_left(Cursor())

    def batches_left(self, cursor: Cursor) -> int:
        """Batches of `epoch(cursor)`, the same on every rank.

        Raises:
            DataError: the cursor lies behind the end of the rows.
        """
        *_, current = served = cursor.on_lanes(self._num_lanes).served
        rows_left = cut(self.num_rows, served).rows_per_lane - current.rows_per_lane
        return -(-rows_left // self._rows_per_step)

    def epoch(self, cursor: Cursor) -> Iterator[Batch]:
        """A fresh iterator over the rest of an epoch, with threads of its own that end with it.

        On the same lanes the batches are those of the undisturbed epoch, to the last bit. On other
        lanes every row that is left comes exactly once.

        Args:
            cursor: `Cursor(epoch)`, or where to go on: the `cursor` of the last batch that was used.
                It must come from the same rows, `seed`, `shuffle` and `shuffle_rows`.

        Raises:
            DataError: the cursor lies behind the end of the rows; from the iterator, where rows cannot
                be read or encoded.
        """
        cursor = cursor.on_lanes(self._num_lanes)
        return self._stream(self._plan(cursor), cursor)

    def _plan(self, cursor: Cursor) -> RowPlan:
        return RowPlan(
            self._row_groups,
            cursor,
            seed=self._seed,
            shuffle=self._shuffle,
            window_rows=self._window_rows,
        )

    def _stream(self, plan: RowPlan, cursor: Cursor) -> Iterator[Batch]:
        abandoned = Event()
        # A window ahead for each lane.
        pieces = prefetch(self._pieces(plan, cursor, abandoned), depth=len(self._lanes))
        try:
            yield from prefetch(self._batches(pieces, plan.lanes, cursor), self._prefetch_batches)
        finally:
            abandoned.set()

    def _pieces(
        self, plan: RowPlan, cursor: Cursor, abandoned: Event
    ) -> Generator[tuple[int, pa.Table], None, None]:
        """The encoded rows of this rank's lanes, piece by piece in the order in which steps need them."""
        rows = IntervalReader(
            self._batcher,
            self._columns,
            self._encode,
            skips=self._skip_log if self._skip_bad else None,
            most_skipped=max(
                len(self._lanes) * plan.lanes.rows_per_lane // 2,
                2 * max(group.num_rows for group in self._row_groups),
            ),
            abandoned=abandoned,
        )
        start = cursor.served[-1].rows_per_lane
        shares = [_from_position(plan.pieces(lane, start), lane) for lane in self._lanes]
        for _, lane, piece in heapq.merge(*shares):
            if piece.window is None:
                yield lane, self._batcher.padding(piece.num_rows)
            else:
                yield lane, rows.read(plan.window(*piece.window), lane).slice(piece.start, piece.num_rows)

    def _batches(
        self, pieces: Generator[tuple[int, pa.Table], None, None], lanes: Lanes, cursor: Cursor
    ) -> Generator[Batch, None, None]:
        noise_seed = int(mix64(np.array([cursor.epoch], dtype=np.int64), self._seed)[0] >> np.uint64(1))
        if self._pins_for is not None:
            torch.cuda.set_device(self._pins_for)  # of this thread, or it would use the first one
        with closing(pieces):
            for tables in _steps(pieces, self._lanes, self._rows_per_step):
                start, num_rows = cursor.served[-1].rows_per_lane, tables[0].num_rows
                real_rows = lanes.real_rows(start, start + num_rows)
                cursor = cursor.advanced(num_rows)
                batch = self._batcher.make(
                    pa.concat_tables(tables),
                    self._strata(real_rows, num_rows),
                    noise_seed,
                    cursor,
                    int(real_rows.sum()),
                )
                yield batch if self._pins_for is None else batch.pin_memory()

    def _strata(self, real_rows: NDArray[np.int64], rows_per_lane: int) -> NDArray[np.float32]:
        """Places of this rank's rows among the real ones of the step: the first of all lanes, the second, ...

        So every rank has all levels of noise. Were the lanes side by side, one rank would have the highest,
        nearly all of its cells targets, and all others would wait for it.

        Args:
            real_rows: [lanes] of the step; the rest of each lane's `rows_per_lane` is padding.
            rows_per_lane: of the step.
        """
        is_real = np.arange(rows_per_lane)[:, None] < real_rows
        places = np.maximum(is_real.cumsum().reshape(is_real.shape) - 1, 0)
        mine = places[:, self._lanes.start : self._lanes.stop].T.ravel()
        return ((mine + 0.5) / real_rows.sum()).astype(np.float32)


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
    movement: Mapping[str, NDArray[np.float32]] | None = None,
    frequencies: Collection[Frequency] = get_args(Frequency),
    encoder: Encoder | None = None,
    device: torch.device | None = None,
) -> Reader:
    """Opens one split of a prepared data set.

    Training takes `data.lanes` lanes. Evaluation takes one lane a rank and rounds `batch_size` up to a
    multiple of the ranks.

    Args:
        config: the run.
        split: which rows.
        statistics: of the training rows.
        rank: this process.
        world_size: number of processes.
        batch_size: rows of a step over all ranks.
        train: whether to train on the rows, or to evaluate them.
        seed: of the shuffle and of the noise.
        oov_dropout: see `Batcher`; ids are dropped from rows to train on alone.
        movement: see `Batcher`.
        frequencies: see `Batcher`.
        encoder: encodes raw rows; needed if and only if `data.encode` is `on_the_fly`.
        device: see `Reader`.

    Raises:
        ConfigError: lanes, ranks and batch size do not fit each other.
        DataError: no files, damaged files, no rows, or in training fewer rows than lanes.
        PreparedAnewError: the directory holds another preparation than that of the statistics.
    """
    data = config.data
    if (data.encode == "on_the_fly") != (encoder is not None):
        raise ValueError(f"`data.encode: {data.encode}` and encoder {encoder!r} do not fit")
    batcher = Batcher(config.features, statistics, oov_dropout, movement, frequencies, drop_ids=train)
    columns = batcher.encoded_schema.names if encoder is None else required_columns(config.features)
    num_lanes = (data.lanes or world_size) if train else world_size
    if not train:
        batch_size = -(-batch_size // num_lanes) * num_lanes
    row_groups = prepared_row_groups(config, split, statistics)
    if train:
        _check_enough_rows(row_groups, num_lanes)
    return Reader(
        row_groups,
        batcher,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        num_lanes=num_lanes,
        seed=seed,
        shuffle=train and data.shuffle,
        shuffle_rows=data.shuffle_rows,
        prefetch_batches=data.prefetch_batches,
        columns=columns,
        encode=encoder.encode if encoder is not None else None,
        skip_bad=data.on_bad_shard == "skip",
        device=device,
    )


def _check_enough_rows(row_groups: Sequence[RowGroup], num_lanes: int) -> None:
    num_rows = sum(group.num_rows for group in row_groups)
    if num_rows < num_lanes:
        raise DataError(
            f"{split_of(row_groups)}: {num_rows} row(s) cannot be shared by {num_lanes} lanes (one a rank "
            "unless `data.lanes` is set); use fewer ranks or more data"
        )


def _from_position(pieces: Iterable[Piece], lane: int) -> Iterator[tuple[int, int, Piece]]:
    """The pieces of a lane, each with its position in the lane before it."""
    position = 0
    for piece in pieces:
        yield position, lane, piece
        position += piece.num_rows


def _steps(
    pieces: Iterable[tuple[int, pa.Table]], lanes: Sequence[int], rows_per_step: int
) -> Iterator[list[pa.Table]]:
    """Cuts the pieces of each lane, laid end to end, into steps; the last one may be smaller.

    Pieces have to come in order of their positions: then none is asked for before a step needs it.
    """
    held: dict[int, pa.Table] = {}
    for lane, table in pieces:
        held[lane] = pa.concat_tables([held[lane], table]) if lane in held else table
        while len(held) == len(lanes) and all(rows.num_rows >= rows_per_step for rows in held.values()):
            yield [held[lane].slice(0, rows_per_step) for lane in lanes]
            rest = {lane: rows.slice(rows_per_step) for lane, rows in held.items()}
            held = {lane: rows for lane, rows in rest.items() if rows.num_rows}
    if held:
        yield [held[lane] for lane in lanes]
