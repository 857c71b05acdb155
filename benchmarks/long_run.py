"""Whether memory stays flat: trains on many rows for many minutes and looks at what the process holds.

    python -m benchmarks.long_run --results benchmarks/results

The project's own training of one process: its reader over Parquet shards, shuffled, epoch after epoch, with
evaluations, checkpoints and logs. It ends as a scheduler would end it, by SIGTERM, when both the minutes and
the rows are reached.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from threading import Event, Thread
from types import TracebackType
from typing import Any

import psutil

from benchmarks.evidence.tables import Table
from benchmarks.throughput.click_log import ClickLog, write_click_log
from benchmarks.throughput.page import Provenance, wrapped, write_page
from benchmarks.throughput.scenario import Case, Scenario, cases_of
from benchmarks.throughput.workloads import open_reader, open_trainer
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.terminal import quiet_libraries
from hetegen_rec.training.trainer import Trainer

NAME = "long_run"
TOLERANCE = 0.05
"""By how much memory may differ from that of the first interval."""
VALID_ROWS = 32_768
_MIB = 1 << 20

SCENARIO: dict[str, Any] = {
    "question": "Does a training that goes on and on hold the same memory?",
    "log": {"fields": 26, "table_rows": 2_600_000, "rows_per_file": 1_000_000},
    "config": {
        "model": {"dim": 16, "backbone": {"name": "deepfm"}},
        "train": {"batch_size": 4096, "evaluations_per_epoch": 10},
        "data": {"shuffle_rows": 131_072},
        "checkpoints": {"every_minutes": 5.0},
    },
    "variants": [{"name": "deepfm"}],
}


@dataclass(frozen=True)
class Sample:
    """One look at the training."""

    seconds: float
    """Since its start."""
    resident: int
    """Bytes of the process and its children."""
    rows: int
    """Trained so far."""


@dataclass(frozen=True)
class Interval:
    """The looks of one interval together."""

    seconds: float
    """Its end, since the start of the training."""
    resident: float
    """Mean over the looks."""
    least: int
    most: int
    rows: int
    """Trained by its end."""


@dataclass(frozen=True)
class Findings:
    """What a run came to."""

    intervals: list[Interval]
    rows: int
    """Trained, by the state of the trainer at the end."""
    seconds: float

    @property
    def changes(self) -> list[float]:
        """Memory of each interval, relative to that of the first."""
        first = self.intervals[0].resident
        return [interval.resident / first - 1.0 for interval in self.intervals]

    @property
    def is_flat(self) -> bool:
        """Whether no interval differs from the first by more than is tolerated."""
        return all(abs(change) <= TOLERANCE for change in self.changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and writes numbers and table; returns an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    quiet_libraries()
    (case,) = cases_of(Scenario.model_validate(SCENARIO), [f"log.rows={options.rows}", *options.overrides])
    with start_runtime("cpu") as runtime:
        if runtime.world_size > 1:
            print("benchmarks.long_run: trains in one process; run it without a launcher", file=sys.stderr)
            return 2
        made = Provenance.here(["python", "-m", "benchmarks.long_run", *given], runtime, with_jobs=False)
        findings = run(case, options.minutes, options.every, runtime)
        made = replace(made, load=round(os.getloadavg()[1], 1))
    for path in write_page(options.results, NAME, as_json(findings, made), page(findings, case), made):
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.long_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value of the run; `log.` for the rows")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the log, and the fewest to train")
    parser.add_argument("--minutes", type=float, default=20.0, help="the shortest to train for")
    parser.add_argument("--every", type=float, default=60.0, help="seconds of a line of the table")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks") / NAME, help="directory")
    return parser.parse_intermixed_args(given)


def run(case: Case, minutes: float, every: float, runtime: Runtime) -> Findings:
    """Trains until the log was seen once, and for so many minutes.

    Args:
        case: what to train, on what.
        minutes: the shortest to train for.
        every: seconds of an interval.
        runtime: this process's view of the job.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        log = write_click_log(case.log, directory / "train" / "log.parquet")
        readers = (open_reader(case, log, runtime), open_reader(case, _valid(log), runtime))
        stop = StopRequest()
        trainer = open_trainer(case, log, readers, directory, stack, runtime, stop)
        trainer.writer.reserve(trainer.model.dmp, trainer.optimizer)
        with stop, Observer(trainer, seconds=60.0 * minutes, rows=log.config.rows, every=every) as observer:
            trainer.run()
        return Findings(intervals_of(observer.samples, every), rows_of(trainer), observer.samples[-1].seconds)


def _valid(log: ClickLog) -> ClickLog:
    """Rows to evaluate, of the same statistics."""
    rows = min(VALID_ROWS, log.config.rows)
    config = log.config.model_copy(update={"rows": rows, "seed": log.config.seed + 1})
    valid = write_click_log(config, log.paths[0].parent.with_name("valid") / "log.parquet")
    return replace(valid, statistics=log.statistics)


def rows_of(trainer: Trainer) -> int:
    """What it trained so far on one lane, which has no padding."""
    cursor = trainer.state.cursor
    return cursor.epoch * trainer.train_reader.num_rows + cursor.rows_per_lane


class Observer:
    """Context in which a thread looks at a training, and asks it to stop when it was seen enough."""

    def __init__(self, trainer: Trainer, *, seconds: float, rows: int, every: float) -> None:
        """Looks at nothing yet.

        Args:
            trainer: of this process.
            seconds: shortest time to train.
            rows: fewest rows to train.
            every: seconds of an interval, of which at least one is to be complete.
        """
        self._trainer = trainer
        self._seconds, self._rows = max(seconds, every), rows
        self._pause = min(1.0, every / 10.0)
        self._over = Event()
        self._thread = Thread(target=self._look, daemon=True)
        self.samples: list[Sample] = []

    def __enter__(self) -> "Observer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        process, start, has_asked = psutil.Process(), time.monotonic(), False
        while not self._over.wait(self._pause):
            resident = sum(resident_bytes(one) for one in (process, *process.children(recursive=True)))
            sample = Sample(time.monotonic() - start, resident, rows_of(self._trainer))
            self.samples.append(sample)
            if not has_asked and sample.seconds > self._seconds and sample.rows >= self._rows:
                has_asked = True
                os.kill(os.getpid(), signal.SIGTERM)


def resident_bytes(process: psutil.Process) -> int:
    """Of one process; none of one that is gone."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def intervals_of(samples: Sequence[Sample], every: float) -> list[Interval]:
    """The complete intervals of so many seconds."""
    intervals = []
    for number in range(int(samples[-1].seconds // every)):
        looks = [one for one in samples if number * every <= one.seconds < (number + 1) * every]
        if not looks:
            continue
        resident = [one.resident for one in looks]
        end = (number + 1) * every
        intervals.append(Interval(end, fmean(resident), min(resident), max(resident), looks[-1].rows))
    return intervals


def as_json(findings: Findings, made: Provenance) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "scenario": NAME,
        "definition": SCENARIO,
        "made": asdict(made),
        "rows": findings.rows,
        "seconds": findings.seconds,
        "rows_per_second": findings.rows / findings.seconds,
        "tolerance": TOLERANCE,
        "is_flat": findings.is_flat,
        "change_at_end": findings.changes[-1],
        "intervals": [
            {**asdict(interval), "change": change}
            for interval, change in zip(findings.intervals, findings.changes, strict=True)
        ],
    }


def page(findings: Findings, case: Case) -> Iterator[str]:
    """Markdown lines, without what they were made on."""
    first, last = findings.intervals[0], findings.intervals[-1]
    largest = max(findings.changes, key=abs)
    log, config = case.log, case.config
    yield "# Memory of a training that goes on"
    yield ""
    yield from wrapped(
        f"Goal: resident memory within {TOLERANCE:.0%} of minute {_minute(first)} up to minute "
        f"{_minute(last)}. {'Reached' if findings.is_flat else 'Missed'}: {findings.changes[-1]:+.1%} in "
        f"minute {_minute(last)}, and {largest:+.1%} in the minute that differs the most."
    )
    yield ""
    rows = [_row(*one) for one in zip(findings.intervals, findings.changes, strict=True)]
    heading = ("minute", "resident MiB", "change", "least MiB", "most MiB", "rows trained")
    yield from Table(heading, rows).markdown()
    yield ""
    yield from wrapped(
        f"{findings.rows:,} rows were trained in {findings.seconds / 60.0:.1f} minutes, "
        f"{findings.rows / log.rows:.2f} epochs of {log.rows:,} rows: DeepFM with {log.fields} fields of "
        f"{log.values_per_field:,} table rows each, dimension {config.model.dim}, batches of "
        f"{config.train.batch_size:,}, {config.data.shuffle_rows:,} rows to shuffle among, "
        f"{config.train.evaluations_per_epoch} evaluations an epoch, each with a checkpoint, and another "
        f"checkpoint after {config.checkpoints.every_minutes:g} minutes without one."
    )
    yield ""
    yield from wrapped(
        "Resident memory: of the process and its children, the mean over the looks of the minute that ends "
        "there, one a second, with the least and the most. The first minute starts with the first step; "
        "tables, optimizer and the buffers of checkpoints are there by then."
    )
    yield ""
    yield from wrapped(
        f"This is no measurement of speed: {findings.rows / findings.seconds:,.0f} rows/s, evaluations and "
        "checkpoints included, on cores that other jobs may have used."
    )


def _minute(interval: Interval) -> str:
    return f"{interval.seconds / 60.0:.3g}"


def _row(interval: Interval, change: float) -> list[str]:
    sizes = [f"{size / _MIB:,.0f}" for size in (interval.resident, interval.least, interval.most)]
    return [_minute(interval), sizes[0], f"{change:+.1%}", *sizes[1:], f"{interval.rows:,}"]


if __name__ == "__main__":
    sys.exit(main())
