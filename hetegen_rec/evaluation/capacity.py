"""A sharding plan as a table for the terminal; what `hetegen plan` found, as JSON and as such tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from hetegen_rec.config.hardware import HardwareProfile
from hetegen_rec.distributed.capacity import HotSpot, LinkBytes, RankMemory, StepTime
from hetegen_rec.distributed.planning import PlannedTable, plan_as_json

NOT_MEASURED = (
    "Estimates, not measured: bytes follow from the plan; times divide them by vendor figures, of which the "
    "hardware profile assumes shares to be usable."
)
MEMORY_PARTS = {
    "tables": "tables",
    "table_optimizer": "table optimizer",
    "dense": "network",
    "activations": "activations",
    "exchange": "looked-up rows",
    "batches": "batches",
    "checkpoint": "checkpoint copy",
    "reserve": "reserve",
}
"""Parts of a rank's memory, by attribute."""
COLLECTIVES = {
    "ids": "id all-to-all",
    "forward": "embedding forward",
    "backward": "embedding backward",
    "dense": "dense all-reduce",
    "host_device": "batch to device",
    "host_tables": "rows of host's tables",
}
TIME_PARTS = {"compute": "compute", "lookup": "lookup", **COLLECTIVES}
LINKS = {"intra_host": "within a host", "inter_host": "between hosts", "host_device": "host and device"}

_GB, _MB = 1e9, 1e6
_HOT = 2.0  # times the mean, from which a rank is worth a word
_MOST_LINES = 32  # of ranks
_MOST_RANKS = 3  # of a table, named one by one


@dataclass(frozen=True)
class CapacityReport:
    """One stage of one run on one cluster."""

    run: str
    stage: str
    hardware: str
    profile: HardwareProfile
    world: str
    sizes_from: str
    """Where the sizes of the tables come from."""
    batch_size: int
    """Rows of a step over all ranks."""
    precisions: tuple[str, str, str]
    """Of the network, of embeddings between ranks, and of their gradients."""
    plan: Sequence[PlannedTable]
    memory: Sequence[RankMemory]
    cap: float
    """Bytes of memory that a rank has where its network runs."""
    host_cap: float
    fits: bool
    traffic: dict[str, LinkBytes]
    """By collective."""
    hot_spot: HotSpot | None
    time: StepTime
    flops_per_rank: float
    """Of a step."""
    dense_parameters: int
    largest_batch: int
    """Rows over all ranks; 0 if not even one row a rank fits."""
    time_of_largest: StepTime | None

    @property
    def time_parts(self) -> list[str]:
        """What a step spends time on there: no copies to a device without one."""
        return [part for part in TIME_PARTS if part in ("compute", "lookup") or part in self.traffic]

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes, seconds and FLOP."""
        return {
            "note": NOT_MEASURED,
            "run": self.run,
            "stage": self.stage,
            "hardware": {"name": self.hardware, **self.profile.model_dump(mode="json")},
            "world": self.world,
            "table_sizes_from": self.sizes_from,
            "batch_size": self.batch_size,
            "precision": dict(zip(("dense", "forward", "backward"), self.precisions, strict=True)),
            "fits": self.fits,
            "tables": plan_as_json(self.plan),
            "memory_by_rank": [{**asdict(one), "total": one.total} for one in self.memory],
            "memory_cap": self.cap,
            "host_memory_cap": self.host_cap,
            "traffic": {name: asdict(links) for name, links in self.traffic.items()},
            "hot_spot": asdict(self.hot_spot) if self.hot_spot else None,
            "step_seconds": _time_as_json(self.time),
            "flops_per_rank": self.flops_per_rank,
            "dense_parameters": self.dense_parameters,
            "largest_batch_size": self.largest_batch,
            "step_seconds_of_largest": _time_as_json(self.time_of_largest) if self.time_of_largest else None,
        }


def capacity_tables(report: CapacityReport) -> RenderableType:
    """Everything that a plan says, for printing."""
    rows = sum(line.rows for line in report.plan)
    plan = plan_table(report.plan, f"Sharding plan: {len(report.plan)} tables, {rows:,} rows")
    parts: list[RenderableType] = [plan, _memory_table(report), _traffic_table(report)]
    return Group(*parts, _time_table(report), *_conclusions(report))


def _time_as_json(time: StepTime) -> dict[str, float]:
    return {**asdict(time), "serial": time.serial, "overlapped": time.overlapped}


def plan_table(plan: Sequence[PlannedTable], title: str) -> Table:
    """A sharding plan, for printing."""
    table = Table(title=title)
    for name in ("table", "rows", "dim", "sharding", "ranks", "kernel", "MiB"):
        table.add_column(name, justify="right" if name in ("rows", "dim", "MiB") else "left")
    for line in plan:
        ranks = ranks_text(line.ranks)
        cells = (f"{line.rows:,}", str(line.dim), line.sharding, ranks, line.kernel, f"{line.mib:,.2f}")
        table.add_row(line.table, *cells)
    return table


def ranks_text(ranks: Sequence[int]) -> str:
    """Few ranks one by one, many in a row as a range."""
    if len(ranks) <= _MOST_RANKS:
        return ", ".join(map(str, ranks))
    is_range = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if is_range else f"{len(ranks)} ranks"


def _memory_table(report: CapacityReport) -> Table:
    fullest = sorted(range(len(report.memory)), key=lambda rank: -report.memory[rank].total)
    shown = sorted(fullest[:_MOST_LINES])
    which = f", the {len(shown)} fullest of {len(fullest)} ranks" * (len(shown) < len(fullest))
    is_device = report.profile.device == "cuda"
    caps = f"{report.cap / _GB:,.1f}" + f", {report.host_cap / _GB:,.1f} on the host" * is_device
    table = Table(title=f"Memory per rank in GB, of {caps}{which} (estimate)")
    parts = {
        part: title
        for part, title in MEMORY_PARTS.items()
        if any(getattr(one, part) for one in report.memory)
    }
    titles = ["rank", *parts.values(), "total", "of cap", *["on host"] * is_device]
    for title in titles:
        table.add_column(title, justify="right")
    for rank in shown:
        one = report.memory[rank]
        cells = [f"{getattr(one, part) / _GB:.2f}" for part in parts]
        hosted = [f"{one.on_host / _GB:.2f}"] * is_device
        table.add_row(str(rank), *cells, f"{one.total / _GB:.2f}", f"{one.total / report.cap:.0%}", *hosted)
    return table


def _traffic_table(report: CapacityReport) -> Table:
    table = Table(title="MB per step through the busiest rank, by link (estimate)")
    for title in ("collective", *LINKS.values(), "all ranks"):
        table.add_column(title, justify="left" if title == "collective" else "right")
    for name, links in report.traffic.items():
        cells = [f"{getattr(links, link) / _MB:,.2f}" for link in LINKS]
        table.add_row(COLLECTIVES[name], *cells, f"{links.total / _MB:,.2f}")
    return table


def _time_table(report: CapacityReport) -> Table:
    time = report.time
    table = Table(title=f"Step of {report.batch_size:,} rows (estimate)", min_width=40)
    for title in ("part", "ms", "share"):
        table.add_column(title, justify="left" if title == "part" else "right")
    for part in report.time_parts:
        title, seconds = TIME_PARTS[part], getattr(time, part)
        table.add_row(title, f"{1e3 * seconds:.3f}", f"{seconds / time.serial:.1%}")
    table.add_section()
    table.add_row("one after the other", f"{1e3 * time.serial:.3f}", "")
    table.add_row("overlapped", f"{1e3 * time.overlapped:.3f}", "")
    return table


def _conclusions(report: CapacityReport) -> list[str]:
    verdict = "fits" if report.fits else "does NOT fit"
    lines = [
        f"{report.run}, stage {report.stage}, {report.world} ranks of {report.hardware}: "
        f"batch size {report.batch_size:,} {verdict}; table sizes from {report.sizes_from}.",
        throughput_text(report),
    ]
    if report.time_of_largest is not None:
        lines.append(
            f"Largest batch size that fits, in powers of two per rank: {report.largest_batch:,} rows, "
            f"{1e3 * report.time_of_largest.overlapped:.1f} to {1e3 * report.time_of_largest.serial:.1f} ms."
        )
    else:
        lines.append("No batch size fits; take more ranks, or a smaller network or tables.")
    spot = report.hot_spot
    if spot is not None and spot.times_mean >= _HOT:
        key = f"distributed.tables.{spot.table}.sharding"
        other = _spreading(spot)
        lines.append(
            f"Rank {spot.rank} sends {spot.times_mean:.1f} times as many looked-up numbers as the mean, most "
            f"of them of table {spot.table}; {key}: {other} may spread them "
            f"better than {spot.sharding}."
        )
    return [*lines, NOT_MEASURED]


def _spreading(spot: HotSpot) -> str:
    """What puts vectors of the table on more ranks: columns first, which send no partial sums."""
    return "grid_shard" if spot.sharding in ("column_wise", "table_column_wise") else "column_wise"


def throughput_text(report: CapacityReport) -> str:
    """Rows per second between no overlap and full overlap, and what would bound them."""
    time = report.time
    slow, fast = report.batch_size / time.serial, report.batch_size / time.overlapped
    parts = {"compute": time.compute, "lookup": time.lookup, "communication": time.communication}
    bound = max(parts, key=lambda name: parts[name])
    return (
        f"{slow:,.0f} to {fast:,.0f} rows/s (estimate, without and with overlap), mostly {bound} "
        f"({parts[bound] / time.serial:.0%} of the step)."
    )
