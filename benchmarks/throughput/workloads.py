"""What a variant does in its turn: some steps, each of them timed."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pyarrow.parquet as pq
from torchrec.optim.keyed import KeyedOptimizer

from benchmarks.throughput.bare_loop import BareLoop
from benchmarks.throughput.before import AsBefore
from benchmarks.throughput.click_log import ClickLog
from benchmarks.throughput.peers.process import open_fuxictr
from benchmarks.throughput.scenario import Case
from benchmarks.throughput.stopwatch import Stopwatch, Turn, Workload
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.interval_reader import SkippedRows
from hetegen_rec.data.raw import list_row_groups
from hetegen_rec.data.reader import BatchSource, Reader
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog
from hetegen_rec.training.checkpoint import Checkpoints
from hetegen_rec.training.checkpoint_writer import CheckpointWriter
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.progress import StageProgress
from hetegen_rec.training.setup import ShardedModel, build_sharded, optimizer_of, rows_per_step
from hetegen_rec.training.state import StageState
from hetegen_rec.training.trainer import Trainer

FILLING_STEPS = 4
"""Untimed steps at the start of a turn, in which the pipeline fills."""


class MadeBatches:
    """A `BatchSource` of batches that a reader made once: every epoch is the same steps."""

    skipped: list[SkippedRows] = []

    def __init__(self, reader: Reader, num_batches: int) -> None:
        """Makes the batches; if the reader has fewer, they come again.

        Args:
            reader: makes them.
            num_batches: of an epoch.
        """
        self.num_rows = reader.num_rows
        self.batches_per_epoch = num_batches
        found = list(islice(reader.epoch(Cursor()), min(num_batches, reader.batches_per_epoch)))
        self.batches = [
            replace(batch, cursor=Cursor(0, (Served(1, number),)))
            for number, batch in enumerate(islice(cycle(found), num_batches), 1)
        ]

    def batches_left(self, cursor: Cursor) -> int:
        """Batches of `epoch(cursor)`."""
        return self.batches_per_epoch - cursor.rows_per_lane

    def epoch(self, cursor: Cursor) -> Iterator[Batch]:
        """The batches behind a cursor."""
        return iter(self.batches[cursor.rows_per_lane :])


class WatchedSource:
    """A `BatchSource` whose batches are noted when they are taken."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self.num_rows = source.num_rows
        self.stopwatch = Stopwatch()

    @property
    def skipped(self) -> list[SkippedRows]:
        """Rows left out so far."""
        return self._source.skipped

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self._source.batches_per_epoch

    def batches_left(self, cursor: Cursor) -> int:
        """Batches of `epoch(cursor)`."""
        return self._source.batches_left(cursor)

    def epoch(self, cursor: Cursor) -> Iterator[Batch]:
        """The batches behind a cursor."""
        return self.stopwatch.watch(self._source.epoch(cursor))


class Training:
    """The trainer, an epoch a turn. It neither evaluates nor saves."""

    def __init__(self, trainer: Trainer, watched: WatchedSource) -> None:
        self._trainer, self._stopwatch = trainer, watched.stopwatch
        trainer.model.dmp.train()
        self._progress = StageProgress("benchmark", trainer.total_steps, 0, enabled=False)

    def turn(self) -> Turn:
        """Trains an epoch."""
        with self._trainer.watchdog.watching():
            self._trainer.train_segment(self._progress)
        return self._stopwatch.read(FILLING_STEPS - 1)


class Bare:
    """The bare loop, the same batches a turn."""

    def __init__(self, loop: BareLoop, made: MadeBatches) -> None:
        self._loop, self._batches = loop, made.batches

    def turn(self) -> Turn:
        """Trains on the batches."""
        stopwatch = Stopwatch()
        # As in the trainer's segments, nobody asks for one batch more.
        self._loop.train(islice(stopwatch.watch(self._batches), len(self._batches)))
        return stopwatch.read(FILLING_STEPS - 1)


class ReaderAlone:
    """The reader without anybody who uses its batches, an epoch a turn, its first window included."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._epoch = reader, 0

    def turn(self) -> Turn:
        """Reads an epoch."""
        stopwatch = Stopwatch()
        for _ in stopwatch.watch(self._reader.epoch(Cursor(self._epoch))):
            pass
        self._epoch += 1
        return stopwatch.read(0)


class ArrowDecode:
    """Arrow decoding the same columns in one thread: what a reader cannot be faster than in one."""

    def __init__(self, log: ClickLog, batch_size: int) -> None:
        self._log, self._batch_size = log, batch_size

    def turn(self) -> Turn:
        """Decodes the whole log; the time of a row group counts for the batches that it holds."""
        seconds: list[float] = []
        columns = self._log.encoded_columns
        cpu = time.process_time()
        for path in self._log.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    start = time.perf_counter()
                    rows = file.read_row_group(group, columns=columns, use_threads=False).num_rows
                    batches = rows / self._batch_size
                    seconds.append((time.perf_counter() - start) / batches)
        cpu = time.process_time() - cpu
        return Turn(seconds, cpu * self._batch_size / self._log.config.rows)


def open_workload(
    case: Case, log: ClickLog, steps: int, directory: Path, stack: ExitStack, runtime: Runtime
) -> Workload:
    """Builds what a variant needs; its files go to a directory of its own. A collective.

    Args:
        case: the variant.
        log: its rows.
        steps: timed steps of a turn on batches made before; on a reader a turn is an epoch.
        directory: for what a trainer writes.
        stack: closes what was opened.
        runtime: this process's view of the job.
    """
    if not case.before:
        return _open(case, log, steps, directory, stack, runtime)
    return AsBefore(case.before, lambda: _open(case, log, steps, directory, stack, runtime))


def _open(
    case: Case, log: ClickLog, steps: int, directory: Path, stack: ExitStack, runtime: Runtime
) -> Workload:
    config = case.config
    if case.measure == "arrow":
        return ArrowDecode(log, rows_per_step(config, runtime))
    if case.measure == "fuxictr":
        return open_fuxictr(case, log, steps, directory, stack)
    reader = open_reader(case, log, runtime)
    if case.measure == "reader":
        return ReaderAlone(reader)
    if case.measure == "bare":
        model, optimizer = _build(case, log, runtime)
        made = MadeBatches(reader, steps + FILLING_STEPS)
        return Bare(BareLoop(model, optimizer, runtime), made)
    source = reader if case.measure == "end_to_end" else MadeBatches(reader, steps + FILLING_STEPS)
    watched = WatchedSource(source)
    trainer = open_trainer(case, log, (watched, reader), directory, stack, runtime, StopRequest())
    return Training(trainer, watched)


def open_trainer(
    case: Case,
    log: ClickLog,
    readers: tuple[BatchSource, Reader],
    directory: Path,
    stack: ExitStack,
    runtime: Runtime,
    stop: StopRequest,
) -> Trainer:
    """The trainer of a stage before its first step. A collective.

    Args:
        case: stage and configuration.
        log: its statistics decide how large the tables are.
        readers: of the rows to train on, and of those to evaluate.
        directory: for logs and checkpoints, of which the newest stays.
        stack: closes what was opened.
        runtime: this process's view of the job.
        stop: what asks it to stop.
    """
    config = case.config
    model, optimizer = _build(case, log, runtime)
    checkpoints = Checkpoints(str(directory / "checkpoints"), runtime, "benchmark")
    run_log = RunLog(
        directory, 0, is_evaluated=False, enabled=runtime.is_main, tensorboard=config.train.tensorboard
    )
    return Trainer(
        config,
        case.stage,
        model,
        optimizer,
        log.statistics,
        readers,
        StageState(),
        CheckpointWriter(checkpoints, runtime, keep=1, failed_writes_allowed=0),
        stack.enter_context(run_log),
        stop,
        Watchdog(config.distributed.timeout_seconds, runtime.rank, directory / "stacks.txt", stop),
        runtime,
    )


def _build(case: Case, log: ClickLog, runtime: Runtime) -> tuple[ShardedModel, KeyedOptimizer]:
    model = build_sharded(case.config, case.stage, log.statistics, runtime)
    return model, optimizer_of(case.config, case.stage, model)


def open_reader(case: Case, log: ClickLog, runtime: Runtime) -> Reader:
    """The reader of a stage's training rows, as `open_split` sets it up for prepared ones."""
    config = case.config
    batcher = Batcher(log.schema, log.statistics, frequencies=config.frequencies(case.stage))
    return Reader(
        list_row_groups([str(path) for path in log.paths]),
        batcher,
        rank=runtime.rank,
        world_size=runtime.world_size,
        batch_size=rows_per_step(config, runtime),
        num_lanes=config.data.lanes or runtime.world_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        shuffle_rows=config.data.shuffle_rows,
        prefetch_batches=config.data.prefetch_batches,
        columns=batcher.encoded_schema.names,
    )
