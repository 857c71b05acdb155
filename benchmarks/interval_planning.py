"""What it costs to plan who reads which rows, and whether all ranks together read every row exactly once.

    python -m benchmarks.interval_planning --results benchmarks/results

Files are written whose footers stand for many rows: of one constant column, which takes next to no bytes.
Their row groups are listed, and epochs over them are planned as readers plan them.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.evidence.tables import Table
from benchmarks.throughput.page import Provenance, wrapped, write_page
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.raw import RowGroup, list_row_groups
from hetegen_rec.data.row_plan import RowPlan, Window
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.terminal import quiet_libraries

NAME = "interval_planning"
RANKS = (1, 16, 64)
BEFORE_AND_AFTER = (16, 64)
"""Ranks of the epoch that is resumed: those it begins on, and those it goes on with."""
_SEED = 7
_MIB = 1 << 20

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Cost:
    """Of one piece of work."""

    seconds: float
    """Median over the repeats."""
    peak_bytes: int
    """What it allocates at the most, in a repeat of its own."""


@dataclass(frozen=True)
class Planned:
    """One epoch."""

    name: str
    ranks: int
    plan: Cost
    """What every rank does when an epoch begins: the order of the row groups, and where the lanes are cut."""
    pieces: Cost
    """What all ranks hand out, as slices of windows."""
    windows: Cost
    """Which rows of which row groups each window of all ranks reads, and the order of its rows."""
    rows: int
    """Handed out by all ranks, before the restart and after it where there is one."""
    missed: int
    """Rows that no rank hands out."""
    repeated: int
    """Rows that are handed out more than once."""


@dataclass(frozen=True)
class Size:
    """Everything for one number of rows."""

    rows: int
    files: int
    row_groups: int
    listing: Cost
    epochs: list[Planned]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and writes numbers and tables; the exit code is 1 if not every row is read exactly once."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    quiet_libraries()
    with start_runtime("cpu") as runtime:
        command = ["python", "-m", "benchmarks.interval_planning", *given]
        made = Provenance.here(command, runtime, with_jobs=False)
    sizes = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
            write_files(Path(directory), rows, options.rows_per_group, options.groups_per_file)
            sizes.append(measure(Path(directory), options.window_rows, options.repeats))
    made = replace(made, load=round(os.getloadavg()[1], 1))
    numbers = {"scenario": NAME, "made": asdict(made), "sizes": [asdict(size) for size in sizes]}
    lines = page(sizes, options.window_rows, options.repeats)
    for path in write_page(options.results, NAME, numbers, lines, made):
        print(f"wrote {path}", file=sys.stderr)
    return 0 if all(is_exact(size) for size in sizes) else 1


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.interval_planning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = [10**6, 10**7, 10**8]
    parser.add_argument(
        "--rows", type=int, nargs="+", default=sizes, help="numbers of rows, one after another"
    )
    parser.add_argument("--rows-per-group", type=int, default=10_000, help="rows of a row group")
    parser.add_argument("--groups-per-file", type=int, default=10, help="row groups of a file")
    parser.add_argument("--window-rows", type=int, default=1_000_000, help="as `data.shuffle_rows`")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks") / NAME, help="directory")
    return parser.parse_args(given)


def write_files(directory: Path, rows: int, rows_per_group: int, groups_per_file: int) -> None:
    """Equal files, the last one with the rows that are left."""
    rows_per_file = rows_per_group * groups_per_file
    whole, rest = divmod(rows, rows_per_file)
    model = directory / "model"
    if whole:
        _write(model, rows_per_file, rows_per_group)
    for number in range(whole):
        shutil.copyfile(model, directory / f"part-{number:06d}.parquet")
    if rest:
        _write(directory / f"part-{whole:06d}.parquet", rest, rows_per_group)


def _write(path: Path, rows: int, rows_per_group: int) -> None:
    table = pa.table({"constant": pa.array(np.zeros(rows, np.int8))})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")


def measure(directory: Path, window_rows: int, repeats: int) -> Size:
    """Lists the files of a directory and plans epochs over their rows."""
    listing, groups = cost(lambda: list_row_groups([f"{directory}/*.parquet"]), repeats)
    starts = [(f"{ranks} rank(s)", Cursor().on_lanes(ranks)) for ranks in RANKS]
    rows = groups[-1].next_row
    before, after = BEFORE_AND_AFTER
    # Amid a window and a row group of every lane, as a restart would have it.
    resumed = Cursor(0, (Served(before, 5 * rows // (9 * before)),)).on_lanes(after)
    starts.append((f"{before} ranks, resumed by {after}", resumed))
    epochs = [measure_epoch(name, groups, cursor, window_rows, repeats) for name, cursor in starts]
    return Size(rows, len({group.path for group in groups}), len(groups), listing, epochs)


def measure_epoch(
    name: str, groups: Sequence[RowGroup], cursor: Cursor, window_rows: int, repeats: int
) -> Planned:
    """Plans one epoch from a cursor on, one lane a rank.

    Args:
        name: for the page.
        groups: all row groups.
        cursor: the beginning, or where the epoch goes on.
        window_rows: rows of a window.
        repeats: of what is timed.
    """
    planning, plan = cost(lambda: plan_of(groups, cursor, window_rows), repeats)
    ranks = plan.lanes.num_lanes
    cutting, _ = cost(lambda: [list(plan.pieces(lane)) for lane in range(ranks)], repeats)
    windows = {
        piece.window for lane in range(ranks) for piece in plan.pieces(lane) if piece.window is not None
    }

    def make_windows() -> None:
        for window in windows:
            plan.window(*window)

    making, _ = cost(make_windows, repeats)
    times = np.zeros(plan.num_rows, np.uint8)
    for number, entry in enumerate(cursor.served):
        opened = replace(cursor, served=(*cursor.served[:number], Served(entry.num_lanes, 0)))
        part = plan_of(groups, opened, window_rows)
        is_last = number == len(cursor.served) - 1
        count(part, part.lanes.rows_per_lane if is_last else entry.rows_per_lane, times)
    return Planned(
        name=name,
        ranks=ranks,
        plan=planning,
        pieces=cutting,
        windows=making,
        rows=int(times.sum(dtype=np.int64)),
        missed=int((times == 0).sum()),
        repeated=int((times > 1).sum()),
    )


def plan_of(groups: Sequence[RowGroup], cursor: Cursor, window_rows: int) -> RowPlan:
    """As a reader plans an epoch that is shuffled."""
    return RowPlan(groups, cursor, seed=_SEED, shuffle=True, window_rows=window_rows)


def count(plan: RowPlan, rows_per_lane: int, times: NDArray[np.uint8]) -> None:
    """Adds the first rows that all lanes hand out to the times that each row of the split was handed out."""
    for lane in range(plan.lanes.num_lanes):
        left = rows_per_lane
        for piece in plan.pieces(lane):
            taken = min(piece.num_rows, left)
            left -= taken
            if taken and piece.window is not None:
                rows = rows_of(plan.window(*piece.window))[piece.start : piece.start + taken]
                np.add.at(times, rows, 1)


def rows_of(window: Window) -> NDArray[np.int64]:
    """The rows of a window as numbers within the split, in the order in which they are handed out."""
    rows = np.concatenate(
        [np.arange(interval.start, interval.stop) + interval.group.first_row for interval in window.intervals]
    )
    return rows if window.order is None else rows[window.order]


def cost(work: Callable[[], _Value], repeats: int) -> tuple[Cost, _Value]:
    """Times some work, and looks at its memory in a repeat of its own; with what the work returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    try:
        value = work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Cost(median(seconds), peak), value


def is_exact(size: Size) -> bool:
    """Whether every row is handed out exactly once in every epoch."""
    return all((epoch.rows, epoch.missed, epoch.repeated) == (size.rows, 0, 0) for epoch in size.epochs)


def page(sizes: Sequence[Size], window_rows: int, repeats: int) -> Iterator[str]:
    """Markdown lines, without what they were made on."""
    yield "# Planning who reads which rows"
    yield ""
    exact = all(is_exact(size) for size in sizes)
    yield from wrapped(
        f"In all of these epochs, of up to {max(size.rows for size in sizes):,} rows, every row is handed "
        "out exactly once over all ranks."
        if exact
        else "NOT every row is handed out exactly once: see the last columns."
    )
    yield ""
    yield "## Listing the row groups"
    yield ""
    heading = ("rows", "files", "row groups", "seconds", "ms a file", "peak MiB")
    yield from Table(heading, [_listing_row(size) for size in sizes]).markdown()
    yield ""
    yield "## Planning an epoch"
    yield ""
    names = ("rows", "epoch", "plan ms", "pieces ms", "windows ms", "peak MiB")
    counts = ("rows handed out", "missed", "repeated")
    rows = [_epoch_row(size, epoch) for size in sizes for epoch in size.epochs]
    yield from Table((*names, *counts), rows).markdown()
    yield ""
    yield from wrapped(
        "`plan`: what every rank does when an epoch begins, the order of the row groups and where the lanes "
        "are cut. `pieces`: what all ranks together hand out, as slices of windows. `windows`: which rows of "
        f"which row groups each window of {window_rows:,} rows (or a lane, where that is shorter) reads, and "
        "its shuffled order, for all ranks together; a rank does its share while it reads, one window at a "
        "time, and an order has a number for every row of its window. `peak`: the most that any of the three "
        f"allocates, by tracemalloc in a repeat that is not timed. Times are medians of {repeats} repeats. "
        "Rows are counted one by one; of the epoch that is resumed those that the first ranks hand out "
        "before they are stopped, and those that the others hand out after."
    )


def _listing_row(size: Size) -> list[str]:
    seconds = size.listing.seconds
    return [
        f"{size.rows:,}",
        f"{size.files:,}",
        f"{size.row_groups:,}",
        f"{seconds:.3f}",
        f"{1e3 * seconds / size.files:.2f}",
        f"{size.listing.peak_bytes / _MIB:.2f}",
    ]


def _epoch_row(size: Size, epoch: Planned) -> list[str]:
    parts = (epoch.plan, epoch.pieces, epoch.windows)
    return [
        f"{size.rows:,}",
        epoch.name,
        *(f"{1e3 * part.seconds:,.2f}" for part in parts),
        f"{max(part.peak_bytes for part in parts) / _MIB:.2f}",
        f"{epoch.rows:,}",
        f"{epoch.missed:,}",
        f"{epoch.repeated:,}",
    ]


if __name__ == "__main__":
    sys.exit(main())
