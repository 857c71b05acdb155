"""What a rehearsal of a plan found, as JSON and as tables for the terminal."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from hetegen_rec.distributed.planning import PlannedTable
from hetegen_rec.evaluation.capacity import ranks_text
from hetegen_rec.files import write_whole

_KB = 1e3
_MOST_NAMES = 3  # of tables that went alike


@dataclass(frozen=True)
class RehearsedTable:
    """One table: as it was planned and as it was run."""

    planned: PlannedTable
    rows: int
    """It was run with."""
    sharding: str
    """It was run with, as its kernel."""
    kernel: str
    ranks: tuple[int, ...]
    """That held shards of it."""
    not_run: str | None
    """What of the plan was not run, and what was in its place."""


@dataclass(frozen=True)
class LinkComparison:
    """Bytes of a step through the busiest rank, within its host and between hosts."""

    predicted: tuple[float, float]
    counted: tuple[float, float]


@dataclass(frozen=True)
class Rehearsal:
    """A plan's steps on ranks of one machine."""

    run: str
    stage: str
    world: str
    factor: int
    """What the rows of tables were divided by."""
    least_rows: int
    """That no table was cut below."""
    batch_size: int
    """Rows of a step over all ranks."""
    tables: Sequence[RehearsedTable]
    losses: Sequence[Sequence[float]]
    """By step, then by rank."""
    differing: Sequence[str]
    """What should be alike on all ranks, and is not."""
    lookup_errors: dict[str, float]
    """By table, the largest difference of a looked-up number from what the table was filled with."""
    lookup_tolerance: float
    """What of it the precision of the communication explains."""
    traffic: dict[str, LinkComparison]
    replaced: Sequence[str]
    """What of the run's settings, besides tables, CPUs do otherwise."""
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What should not be so after a rehearsal; empty if all is well."""
        found = [f"{what} differ between ranks" for what in self.differing]
        if not all(math.isfinite(loss) for step in self.losses for loss in step):
            found.append("losses are not finite")
        for table, error in self.lookup_errors.items():
            if not error <= self.lookup_tolerance:
                found.append(f"looked-up vectors of table {table} are off by up to {error:.2g}")
        moved = [t.planned.table for t in self.tables if t.not_run is None and t.ranks != t.planned.ranks]
        if moved:
            found.append(f"tables {', '.join(moved)} are not on the ranks of the plan")
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "problems": self.problems}


def write_rehearsal(rehearsal: Rehearsal, directory: Path) -> None:
    """Writes rehearsal.json."""
    write_whole(directory / "rehearsal.json", json.dumps(rehearsal.as_json(), indent=1))


def rehearsal_tables(rehearsal: Rehearsal) -> RenderableType:
    """Everything that a rehearsal found, for printing."""
    return Group(_table_of_tables(rehearsal), _traffic_table(rehearsal), *_conclusions(rehearsal))


def _table_of_tables(rehearsal: Rehearsal) -> Table:
    table = Table(title=f"Rehearsed on {rehearsal.world} gloo ranks of this machine")
    for title in ("table", "rows", "run with", "planned", "run as", "ranks", "planned, not run"):
        table.add_column(title, justify="right" if title in ("rows", "run with") else "left")
    for alike in _groups(rehearsal.tables):
        one = alike[0]
        ranks = sorted({rank for other in alike for rank in other.ranks})
        table.add_row(
            _names([other.planned.table for other in alike]),
            f"{sum(other.planned.rows for other in alike):,}",
            f"{sum(other.rows for other in alike):,}",
            f"{one.planned.sharding}, {one.planned.kernel}",
            f"{one.sharding}, {one.kernel}",
            ranks_text(ranks),
            one.not_run or "",
        )
    return table


def _groups(tables: Sequence[RehearsedTable]) -> list[list[RehearsedTable]]:
    """Tables that were planned and run alike; whole ones on whatever rank they are."""
    found: dict[Any, list[RehearsedTable]] = {}
    for one in tables:
        ranks = one.ranks if len(one.ranks) > 1 else ()
        key = (one.planned.sharding, one.planned.kernel, one.sharding, one.kernel, one.not_run, ranks)
        found.setdefault(key, []).append(one)
    return list(found.values())


def _names(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMES
    if rest <= 1:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {rest} more"


def _traffic_table(rehearsal: Rehearsal) -> Table:
    table = Table(title="KB per step through the busiest rank")
    table.add_column("exchange")
    for link in ("within a host", "between hosts"):
        for kind in ("predicted", "counted"):
            table.add_column(f"{link}, {kind}", justify="right")
    for name, found in rehearsal.traffic.items():
        pairs = zip(found.predicted, found.counted, strict=True)
        table.add_row(name, *(f"{value / _KB:,.1f}" for pair in pairs for value in pair))
    return table


def _conclusions(rehearsal: Rehearsal) -> list[str]:
    means = ", ".join(f"{sum(step) / len(step):.4f}" for step in rehearsal.losses)
    lines = [
        f"{rehearsal.run}, stage {rehearsal.stage}: {len(rehearsal.losses)} steps of {rehearsal.batch_size} "
        f"random rows in {rehearsal.seconds:.0f} s. The rows of tables were divided by {rehearsal.factor:,}, "
        f"but none was cut below {rehearsal.least_rows:,}, so that every field keeps its kind of head.",
        f"Loss of each step, mean over the ranks: {means}. Looked-up vectors differ from what the tables "
        f"were filled with by at most {max(rehearsal.lookup_errors.values()):.1g}.",
        *(f"Other than planned: {what}." for what in rehearsal.replaced),
    ]
    if rehearsal.problems:
        return [*lines, f"NOT as it should be: {'; '.join(rehearsal.problems)}."]
    return [
        *lines,
        "Losses are finite on every rank; weights of the network and losses by field are the same on all; "
        "every table that was run as planned is on the ranks of the plan.",
    ]
